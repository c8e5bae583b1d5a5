"""`llmtrain plan calibrate`: measure this machine's CPU as so many ranks use it, and write its description for `--hardware`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import yaml

from llmtrain.errors import UserError
from llmtrain.hardware.cores import allowed_cpus, bind, place, read_cores
from llmtrain.tools.plan.calibrate_links import collectives
from llmtrain.tools.plan.calibrate_memory import retained
from llmtrain.tools.plan.calibrate_operators import rates

SECONDS = 0.9
"""That each operator is measured for if not said."""


def main(argv: list[str]) -> int:
    """Measure in as many processes as a run would have, and write the file; returns 0."""
    options = parser().parse_args(argv)
    if options.rank is not None:
        print(json.dumps(_measure(options.rank, options.ranks, Path(options.store), options.seconds)))
        return 0
    found = measured(options.ranks, options.seconds)
    values = description(found, options.ranks)
    if options.memory:
        source = f"small runs of `llmtrain plan calibrate --ranks {options.ranks} --memory`"
        process, kept = retained(values, options.ranks)
        values["rates"]["process"] = {"value": float(f"{process:.4g}"), "source": source}
        values["rates"]["retained"] = {name: {"value": float(f"{value:.3g}"), "source": source} for name, value in kept.items()}
    Path(options.out).write_text(yaml.safe_dump(values, sort_keys=False))
    rates = f"{found['float32'] / 1e9:,.0f} GFLOP/s in fp32, {found['bandwidth'] / 1e9:,.1f} GB/s"
    print(f"wrote {options.out}: {rates}, for each of {options.ranks}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain plan calibrate`."""
    found = argparse.ArgumentParser("llmtrain plan calibrate", description="measure this machine (CPU) and write its description")
    found.add_argument("--ranks", type=int, default=1, help="processes that a run will have here, which share its cores and memory (1)")
    found.add_argument("--out", default="this-machine.yaml", metavar="FILE", help="this-machine.yaml if not given")
    found.add_argument("--memory", action="store_true", help="measure what processes hold beside tensors, too, by small runs")
    found.add_argument("--seconds", type=float, default=SECONDS, help=f"how long each operator is measured ({SECONDS})")
    found.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    found.add_argument("--store", default="", help=argparse.SUPPRESS)
    return found


def measured(ranks: int, least: float = SECONDS) -> dict[str, Any]:
    """What the ranks reach on average while all of them measure. Raises UserError if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": str(threads(ranks))}
        words = [sys.executable, "-m", "llmtrain", "plan", "calibrate", "--ranks", str(ranks), "--store", f"{folder}/store"]
        words += ["--seconds", str(least)]
        started = [subprocess.Popen([*words, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=env) for rank in range(ranks)]
        texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError("plan calibrate: a rank failed; its error is above")
    each = [json.loads(text.strip().splitlines()[-1]) for text in texts]
    found = {name: fmean(one[name] for one in each) for name in each[0] if name != "collectives"}
    links = zip(*(one["collectives"] for one in each))
    mean = [(*same[0][:2], harmonic_mean([one[2] for one in same]), fmean(one[3] for one in same)) for same in links]
    return found | {"collectives": mean}


def _measure(rank: int, ranks: int, store: Path, least: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    torch.manual_seed(rank)
    bind(place(ranks, rank, cores=read_cores(allowed_cpus())).cpus)  # as the launcher binds the ranks of a run
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found: dict[str, Any] = rates(least)
    found["collectives"] = collectives(rank, ranks) if ranks > 1 else []
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return found


def description(found: dict[str, Any], ranks: int) -> dict:
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
        "links": {"node": {"name": "gloo", **quantity(1e10)}},
        "devices_per_node": ranks,
        "cores": len(allowed_cpus()) / threads(ranks),
        "rates": {
            **{name: quantity(found[name]) for name in ("attention", "attention_backward", "context", "context_backward")},
            "memory": {"value": 1.0, "source": "the bandwidth is that of element-wise work"},
            "grouped": quantity(found["grouped"]),
            "launch": quantity(found["launch"]),
            "collectives": [
                {"kind": kind, "ranks": size, "latency": float(f"{latency:.3g}"), **quantity(rate)}
                for kind, size, rate, latency in found["collectives"]
            ],
        },
        "notes": f"One of {ranks} ranks on this machine.",
    }


def threads(ranks: int) -> int:
    """Threads of a rank: what OMP_NUM_THREADS says, else its part of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(allowed_cpus()) // ranks))
