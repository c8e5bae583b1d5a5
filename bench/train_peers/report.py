"""Markdown of the results."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

from train_peers.memory import Memory
from train_peers.shape import Shape
from train_peers.speed import Class

PACKAGES = ("torch", "transformers", "litgpt", "torchtitan")
ROOT = Path(__file__).resolve().parent.parent.parent
ABOUT = """Each contender is a process of its own, given the same Llama shape and the same batches, fused AdamW (betas 0.9, 0.95, weight
decay 0.1), gradients clipped to norm 1, causal attention over whole sequences and cross-entropy over all targets. llmtrain is the
engine that `llmtrain train` builds; bf16 is `precision: bf16` for it and autocast with fp32 parameters for the others. Compile:
llmtrain `train.compile: on`, transformers `model.compile(dynamic=False)`, litgpt `torch.compile(model, dynamic=False)`, torchtitan
its `apply_compile` (each block, and the loss). `-chunked` are litgpt's cross-entropy in chunks of 128 tokens and torchtitan's loss in
8 chunks, as their own recipes have it. torchtitan as shipped refuses SDPA for language models, and what it allows has no backward on
a CPU: its own `ScaledDotProductAttention` module is put in, so it is not the torchtitan that a user gets.
"""
FLOPS = """FLOPs of a step: 6 x (parameters without the input embedding) x tokens + 12 x layers x sequence x width x tokens (full
attention). GEMM is a 4096 x 1024 x 1024 product, the best of four after each round; shares are of its median (max) over the rounds.
Times are of whole steps; the ratios are the peer's time over llmtrain's: above 1 llmtrain is faster.
"""


def heading(title: str, shape: Shape, *, command: str, threads: int) -> str:
    """Title, date, commit, machine, versions, command, shape."""
    return (
        f"# {title}\n\n`{command}`, {time.strftime('%Y-%m-%d %H:%M')}, commit {commit()}. {machine()}, {threads} threads, "
        f"load {os.getloadavg()[0]:.1f} at the end. Python {platform.python_version()}, {_versions()}.\n\n"
        f"Shape: width {shape.dim}, {shape.layers} layers, {shape.heads} heads, feed-forward {shape.ffn}, "
        f"{shape.batch} x {shape.seq} tokens a step, untied.\n\n{ABOUT}\n"
    )


def speed_table(result: Class, shape: Shape) -> str:
    """One class as a table with ratios of llmtrain to each peer, if it took part."""
    us = result.timings.get("us")
    lines = [
        f"\n## {result.dtype}, {result.mode}\n",
        "| contender | tokens/s | ms a step, median (min-max) | GFLOP/s | share of GEMM | page faults a step | first step "
        "| loss after it, after all | llmtrain is, by medians | by rounds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    gemm, best = statistics.median(result.gemm), max(result.gemm)
    for timing in result.timings.values():
        rate = shape.flops / timing.median / 1e9
        ratios = [theirs / ours for theirs, ours in zip(timing.rounds, us.rounds)] if us and us is not timing else []
        ratio = f"{timing.median / us.median:.2f}x | {statistics.median(ratios):.2f}x" if ratios else "|"
        lines.append(
            f"| {_name(timing.name)} | {shape.tokens / timing.median:,.0f} | {timing.median * 1e3:,.0f} "
            f"({min(timing.rounds) * 1e3:,.0f}-{max(timing.rounds) * 1e3:,.0f}) | {rate:.0f} | {rate / gemm:.0%} ({rate / best:.0%}) "
            f"| {timing.faults:,.0f} | {timing.first:.1f} s | {timing.losses[0]:.3f}, {timing.losses[-1]:.3f} | {ratio} |"
        )
    lines += [f"| {_name(name)} | failed: {why} | | | | | | | | |" for name, why in result.failed.items()]
    steps = max((len(timing.losses) for timing in result.timings.values()), default=0)
    idle = max((timing.idle for timing in result.timings.values()), default=0.0)
    lines.append(
        f"\nGEMM {gemm:.0f} GFLOP/s (max {best:.0f}); {shape.flops / 1e9:.0f} GFLOP a step; {len(result.gemm)} rounds, {steps} steps "
        f"in all; while others ran, no contender used more than {idle:.1f} s of CPU."
    )
    return "\n".join(lines) + "\n"


def memory_table(results: list[Memory], failed: dict[str, str]) -> str:
    """Peaks by vocabulary and number format."""
    lines = [
        "\nPeak resident set of a process that takes two steps. `state` is fp32 parameters, gradients and moments (16 bytes a parameter), "
        "`above` what the peak is beyond the imports and that.\n",
        "| vocabulary | format | contender | peak | imports | state | above | peers' `above` is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = {(m.vocab, m.dtype): m for m in results if m.name == "us"}
    for m in results:
        us = ours.get((m.vocab, m.dtype))
        ratio = f"{m.above / us.above:.2f}x ours" if us and m.name != "us" else ""
        sizes = " | ".join(f"{size / 2**20:,.0f} MiB" for size in (m.peak, m.imported, m.state, m.above))
        lines.append(f"| {m.vocab:,} | {m.dtype} | {_name(m.name)} | {sizes} | {ratio} |")
    lines += [f"\nFailed: {name}: {why}" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def _name(name: str) -> str:
    return "**llmtrain**" if name == "us" else name


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """Processor, cores, memory."""
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def commit() -> str:
    """Short hash of the commit, and whether the package differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no", "llmtrain", "kernels") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed
