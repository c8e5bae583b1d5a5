"""Timings on the ranks of a world."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from llmtrain.config.parameters import flops_per_token
from llmtrain.config.run import RunConfig
from llmtrain.config.train import ParallelConfig
from llmtrain.device import Device
from llmtrain.device.dtypes import DTYPES, torch_dtype
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel import mesh as world
from llmtrain.tools.selftest.parity_run import Documents, build_engine
from llmtrain.train.stream import micro_batches

SECONDS, REPEATS = 0.3, 5
"""How long, and at least how often, something is timed."""


def matmul(*, device: Device, size: int, format: str) -> tuple[dict, None]:
    """FLOP/s of one square matrix product, and what the hardware's description gives as its peak."""
    dtype = torch_dtype(format)
    a, b = (torch.full((size, size), 0.5, dtype=dtype, device=device.torch_device) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _time(lambda: torch.mm(a, b, out=out), device)
    peak = None if device.kind == "cpu" else device.peak_flops(dtype)
    return {"flops": 2 * size**3 / seconds, "peak": peak, "seconds": seconds}, None


def memory(*, device: Device, mebibytes: int) -> tuple[dict, None]:
    """Bytes/s of a copy on the device, read and written counted."""
    source = torch.zeros(mebibytes * 2**20, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    seconds = _time(lambda: target.copy_(source), device)
    return {"bytes_per_second": 2 * source.numel() / seconds, "seconds": seconds}, None


def collectives(*, device: Device, mebibytes: int) -> tuple[dict, None]:
    """Seconds of an all-reduce over all ranks, and its bus bandwidth: 2 (N - 1) / N x bytes / seconds, the convention of nccl-tests."""
    mesh = world.start(ParallelConfig(dp_shard=-1), device=device)
    ranks = dist.get_world_size()
    tensor = torch.ones(mebibytes * 2**18, dtype=torch.float32, device=device.torch_device)
    dist.all_reduce(tensor)
    right = bool((tensor == ranks).all())
    tensor.fill_(0.0)

    def call() -> None:
        dist.all_reduce(tensor)

    seconds = _time(call, device, repeats=REPEATS)  # all ranks call it equally often
    mesh.leave()
    return {"bytes_per_second": 2 * (ranks - 1) / ranks * tensor.nbytes / seconds, "seconds": seconds, "right": right}, None


def train(*, device: Device, model: dict, ranks: int, seq_len: int, micro_batch: int, precision: str, steps: int) -> tuple[dict, None]:
    """Tokens/s and MFU of a small model over `ranks` ranks of dp_shard: the median of the steps after the first two."""
    if precision == "16 bits":
        precision = next(name for name, dtype in DTYPES.items() if dtype == device.autocast_dtype())
    told = {"steps": steps, "seq_len": seq_len, "micro_batch": micro_batch, "global_batch": micro_batch * ranks, "compile": "off"}
    cfg = RunConfig.model_validate({"model": model, "train": told, "precision": precision, "parallel": {"dp_shard": ranks}})
    device.reset_peak_memory()
    engine, plan = build_engine(cfg, device), StepPlan.from_config(cfg)
    data = Documents(seq_len=seq_len, vocab_size=cfg.model.vocab_size, batch=cfg.train.global_batch, permute=False)
    seconds, losses = [], []
    for index in range(plan.steps):
        step = plan.step(index)
        batches = micro_batches(step, data, rank=engine.mesh.data_rank, ranks=ranks)
        device.synchronize()
        start = time.perf_counter()
        losses.append(engine.forward_backward(batches).loss)
        engine.grad_norm()
        engine.apply(lr=step.lr)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    typical, tokens = median(seconds[2:]), cfg.train.global_batch * seq_len
    peak, dtype = device.peak_flops(torch_dtype(precision)), precision
    rate = tokens / typical
    mfu = rate * flops_per_token(cfg.model, seq_len) / (peak * ranks) if peak else None
    return {
        "tokens_per_second": rate,
        "mfu": mfu,
        "step_seconds": typical,
        "losses": losses,
        "memory": device.memory().peak,
        "format": dtype,
    }, None


def _time(call: Callable[[], object], device: Device, *, repeats: int | None = None) -> float:
    """The median of the seconds of single calls."""
    call()
    seconds: list[float] = []
    while len(seconds) < (repeats or REPEATS) or (repeats is None and sum(seconds) < SECONDS):
        device.synchronize()
        start = time.perf_counter()
        call()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
