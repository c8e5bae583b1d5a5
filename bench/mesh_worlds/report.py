"""Markdown of the results."""

import os
import platform
import statistics
import time
from collections import Counter

import torch
from train_peers.report import commit, machine
from train_peers.shape import Shape

LOSS_LIMIT = 1e-5
CPU_LIMIT = 1.03
ABOUT = """Both sides: the same first weights and batches (rows with different numbers of targets), fp32, one thread a rank, gloo, fused
AdamW, the loss divided by the targets of all ranks, clipping by the global norm, the loss on every rank. llmtrain is the engine of a
session, with its hang watcher; the scripts are `bench/by_hand`, which share the single-device kernels with it (attention, RMSNorm, RoPE,
loss of one rank) and nothing else. The loss takes all rows of a rank at once on both sides (`train.loss_chunk`).

Collectives are those of one step after two, seen at torch's dispatcher on every rank: operator, group, bytes, order. CPU time is user and
system time of all ranks and threads.
"""


def case_text(result) -> str:
    """One mesh in words, for the terminal."""
    count = ", ".join(f"rank {rank}: {len(calls)}" for rank, calls in enumerate(result.calls["ours"]))
    lines = [f"  collectives ({count}): {'the same' if not result.differences else f'{len(result.differences)} differ'}"]
    lines += [f"    {words}" for words in result.differences[:12]]
    lines.append(f"  losses differ by {result.loss_difference:.1e} at most over {len(result.losses['ours'])} steps")
    if result.rounds["ours"]:
        ratios = _ratios(result)
        lines.append(f"  CPU time: {statistics.median(ratios):.3f} of that by hand ({min(ratios):.3f} to {max(ratios):.3f})")
    return "\n".join(lines)


def _ratios(result) -> list[float]:
    return [ours / hand for ours, hand in zip(result.rounds["ours"], result.rounds["hand"])]


def page(results, shape: Shape, *, command: str) -> str:
    """The whole result."""
    parts = [
        "# The native engine against scripts written by hand\n",
        f"`{command}`, {time.strftime('%Y-%m-%d %H:%M')}, commit {commit()}. {machine()}, load {os.getloadavg()[0]:.1f} at the end. "
        f"Python {platform.python_version()}, torch {torch.__version__}.\n",
        f"Shape: width {shape.dim}, {shape.layers} layers, {shape.heads} heads, feed-forward {shape.ffn}, vocabulary {shape.vocab:,} "
        f"({shape.parameters / 1e6:.1f} M parameters), {shape.batch} x {shape.seq} tokens a step.\n",
        ABOUT,
        _summary(results),
    ]
    parts += [_collectives(result) for result in results]
    return "\n".join(parts)


def _summary(results) -> str:
    timed = any(result.rounds["ours"] for result in results)
    head = "| mesh | ranks | collectives of a step, by rank | differ | largest difference of a loss |"
    lines = [head + (" CPU s a step | by hand | ratio, median of pairs (min-max) | clock ratio |" if timed else "")]
    lines.append("|---" * (9 if timed else 5) + "|")
    for result in results:
        counts = "/".join(str(len(calls)) for calls in result.calls["ours"])
        differ = len(result.differences) or "none"
        line = f"| {result.case.name} | {result.case.ranks} | {counts} | {differ} | {result.loss_difference:.1e} |"
        if timed:
            ours, hand = (statistics.median(result.rounds[side]) for side in ("ours", "hand"))
            ratios, clock = _ratios(result), [a / b for a, b in zip(result.clock["ours"], result.clock["hand"])]
            spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
            line += f" {ours:.3f} | {hand:.3f} | **{statistics.median(ratios):.3f}** ({spread}) | {statistics.median(clock):.2f} |"
        lines.append(line)
    if timed:
        rounds = len(results[0].rounds["ours"])
        lines.append(f"\nRatios are llmtrain over by hand, {rounds} interleaved pairs; the bound is {CPU_LIMIT}.")
    return "\n".join(lines) + "\n"


def _collectives(result) -> str:
    """What rank 0 calls, added up, and every difference."""
    lines = [
        f"\n## {result.case.name}\n",
        "Collectives of rank 0, equal ones added up:\n",
        "| operator | over ranks | bytes | calls |",
        "|---|---|--:|--:|",
    ]
    counted = Counter((call.op, ",".join(map(str, call.ranks)), call.bytes) for call in result.calls["ours"][0])
    lines += [f"| {op} | {ranks} | {size:,} | {count} |" for (op, ranks, size), count in counted.items()]
    if result.differences:
        lines += ["\nDifferences:\n", *(f"- {words}" for words in result.differences)]
    return "\n".join(lines) + "\n"
