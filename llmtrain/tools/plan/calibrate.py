"""`llmtrain plan calibrate`: measure this machine's CPU as so many ranks use it, and write its description for `--hardware`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from llmtrain.errors import UserError
from llmtrain.hardware.cores import allowed_cpus

ROUNDS = 7
BATCH, HEADS, LENGTH, WIDTH = 4, 4, 512, 64
"""Of the attention that is measured."""
GATE = (2048, 1024)
"""Rows and columns of the gate."""


def main(argv: list[str]) -> int:
    """Measure in as many processes as a run would have, and write the file; returns 0."""
    options = parser().parse_args(argv)
    if options.rank is not None:
        print(json.dumps(_measure(options.rank, options.ranks, Path(options.store))))
        return 0
    found = measured(options.ranks)
    Path(options.out).write_text(yaml.safe_dump(description(found, options.ranks), sort_keys=False))
    rates = f"{found['float32'] / 1e9:,.0f} GFLOP/s in fp32, {found['bandwidth'] / 1e9:,.1f} GB/s"
    print(f"wrote {options.out}: {rates}, for each of {options.ranks}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain plan calibrate`."""
    found = argparse.ArgumentParser("llmtrain plan calibrate", description="measure this machine (CPU) and write its description")
    found.add_argument("--ranks", type=int, default=1, help="processes that a run will have here, which share its cores and memory (1)")
    found.add_argument("--out", default="this-machine.yaml", metavar="FILE", help="this-machine.yaml if not given")
    found.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    found.add_argument("--store", default="", help=argparse.SUPPRESS)
    return found


def measured(ranks: int) -> dict[str, float]:
    """What every rank reaches while all of them measure: the slowest of them. Raises UserError if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, len(allowed_cpus()) // ranks))}
        words = [sys.executable, "-m", "llmtrain", "plan", "calibrate", "--ranks", str(ranks), "--store", f"{folder}/store"]
        started = [subprocess.Popen([*words, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=env) for rank in range(ranks)]
        texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError("plan calibrate: a rank failed; its error is above")
    each = [json.loads(text.strip().splitlines()[-1]) for text in texts]
    return {name: (max if name in ("launch", "latency") else min)(one[name] for one in each) for name in each[0]}


def _measure(rank: int, ranks: int, store: Path) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    torch.manual_seed(rank)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = {"float32": _products(torch.float32), "bfloat16": _products(torch.bfloat16), "bandwidth": _elementwise(), "launch": _small()}
    forward, backward = _attention()
    found |= {"attention": forward / found["float32"], "attention_backward": backward / forward}
    found |= _links(ranks)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return found


def _seconds(call) -> float:
    """The median of several calls, after two that warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[ROUNDS // 2]


def _products(dtype) -> float:
    """FLOP/s of [1024,768] by [768,768], about what a small model's blocks have."""
    import torch

    a, b = torch.randn(1024, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype)
    return 2 * 1024 * 768 * 768 / _seconds(lambda: a @ b)


def _elementwise() -> float:
    """Bytes/s of silu(gate) * up, counted as one kernel: two tensors read, one written."""
    import torch

    gate, up = (torch.randn(GATE) for _ in range(2))
    return 3 * 4 * gate.numel() / _seconds(lambda: torch.nn.functional.silu(gate) * up)


def _small() -> float:
    """Seconds of a layer that computes next to nothing."""
    import torch

    layer, x = torch.nn.Linear(8, 8), torch.randn(8, 8)
    return _seconds(lambda: [layer(x) for _ in range(100)]) / 100


def _attention() -> tuple[float, float]:
    """FLOP/s of causal attention, forward and backward, counted as `simulate/blocks.py` counts them."""
    import torch

    from llmtrain.simulate.blocks import attention_flops

    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(3))

    def run():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    flops = attention_flops(rows=BATCH * LENGTH, keys=(LENGTH + 1) / 2, heads=HEADS, width=2 * WIDTH)
    forward = _seconds(run)
    both = _seconds(lambda: run().sum().backward())
    return flops / forward, 2.5 * flops / max(both - forward, 0.1 * both)


def _links(ranks: int) -> dict[str, float]:
    """Bytes/s and seconds of gloo's all-reduce over all ranks."""
    if ranks == 1:
        return {"link": 1e10, "latency": 1e-5}
    import torch
    import torch.distributed as dist

    large, small = torch.zeros(2**22), torch.zeros(16)
    wire = 2 * (ranks - 1) / ranks * 4 * large.numel()
    latency = _seconds(lambda: dist.all_reduce(small))
    return {"link": wire / max(_seconds(lambda: dist.all_reduce(large)) - latency, 1e-6), "latency": latency / (1 + (ranks - 1) / 8)}


def description(found: dict[str, float], ranks: int) -> dict:
    """What `llmtrain.hardware.load` reads."""
    import psutil

    source = f"measured by `llmtrain plan calibrate --ranks {ranks}`"

    def quantity(value: float) -> dict:
        return {"value": float(f"{value:.4g}"), "source": source}

    return {
        "vendor": "this machine",
        "names": [],
        "peak": {dtype: quantity(found[dtype]) for dtype in ("float32", "bfloat16")},
        "memory": {"value": float(psutil.virtual_memory().total // ranks), "source": "psutil, shared by the ranks"},
        "memory_bandwidth": quantity(found["bandwidth"]),
        "links": {"node": {"name": "gloo", **quantity(found["link"])}},
        "devices_per_node": max(ranks, 1),
        "rates": {
            "attention": quantity(found["attention"]),
            "attention_backward": quantity(found["attention_backward"]),
            "memory": {"value": 1.0, "source": "the bandwidth is that of element-wise work"},
            "launch": quantity(found["launch"]),
            "latency": quantity(found["latency"]),
        },
        "notes": f"One of {ranks} ranks on this machine.",
    }
