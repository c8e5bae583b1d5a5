"""The results page."""

import statistics
from collections.abc import Sequence

from tiles.job import Branch, Prompt


def median(seconds: Sequence[float]) -> float:
    """Of several measurements."""
    return statistics.median(seconds)


def expected(compute: float, send: float, count: int) -> float:
    """Seconds that `count` tiles save of computing and sending one after the other (papers: (n - 1) / n of the smaller one)."""
    return (count - 1) / count * min(compute, send)


def hidden(compute: float, send: float, both: float) -> float:
    """The share of the shorter of computing and sending that ran beside the longer one; (n - 1) / n at best."""
    return (compute + send - both) / min(compute, send)


def branch_rows(found: dict) -> list[str]:
    """A row per wire and number of tiles of the attention branch."""
    rows = [
        "| wire | tiles | compute alone, s | send alone, s | both, s (lowest-highest) | saved, s | expected, s | saved / expected "
        "| hidden (at best) |",
        "|---|" + "--:|" * 8,
    ]
    for wire in found["wires"]:
        plain = median(wire["both"]["1"])
        one = median(found["compute"]["1"]), median(wire["send"]["1"])
        for count, seconds in wire["both"].items():
            saved, hoped = plain - median(seconds), expected(*one, int(count))
            alone = median(found["compute"][count]), median(wire["send"][count])
            last = f"{saved:.3f} | {hoped:.3f} | **{saved / hoped:.0%}** | " if hoped else "| | | "
            last += f"{hidden(*alone, median(seconds)):.0%} ({(int(count) - 1) / int(count):.0%})"
            rows.append(f"| {wire['rate'] / 1e6:.0f} Mbit/s | {count} | {alone[0]:.3f} | {alone[1]:.3f} | {spread(seconds)} | {last} |")
    return rows


def prompt_rows(found: dict) -> list[str]:
    """A row per wire and number of tiles of the model's prompt."""
    rows = ["| wire | tiles | prompt, s (lowest-highest) | against 1 tile |", "|---|--:|--:|--:|"]
    for wire in found["prompts"]:
        plain = median(wire["both"]["1"])
        name = "no limit" if wire["rate"] is None else f"{wire['rate'] / 1e6:.0f} Mbit/s"
        rows += [f"| {name} | {count} | {spread(s)} | {plain / median(s):.2f}x |" for count, s in wire["both"].items()]
    return rows


def spread(seconds: Sequence[float]) -> str:
    """`median (lowest-highest)`."""
    return f"{median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"


PAGE = """# Attention, projection and all-reduce in tiles

`{command}`, {date}, commit {commit:.7}. {machine}, load {before:.1f} before and {after:.1f} after. {seconds:.0f} s.

2 ranks of one thread in network namespaces on one wire (`bench/wire`), gloo over TCP, float32. Medians. `compute alone` is the same tiles
without their sums, `send alone` the same all-reduces with nothing to compute. Saved is against 1 tile, which does one after the other;
expected is (n - 1) / n of the smaller of the two at 1 tile. Tiles cost something themselves (calls with an offset have another kernel, sums
have more messages), so `hidden` takes each number of tiles by itself: the share of the shorter of the two that ran beside the longer one.

## One attention branch: {branch.tokens:,} tokens, width {branch.hidden:,}, {branch.heads} heads, {branch.kv_heads} key/value heads

Causal, one sequence; attention is kernels.attention {attention}; {branch_size:.0f} MiB are summed.

{branch_rows}

## A prompt of {prompt.tokens:,} tokens: {prompt.layers} layers of width {prompt.hidden}, `--tp 2 --tp-chunks N`

Attention and feed-forward branches in tiles; {prompt_size:.0f} MiB are summed in all.

{prompt_rows}
"""


def page(found: dict) -> str:
    """The whole of it, in Markdown."""
    branch, prompt = Branch(*found["branch"]), Prompt(*found["prompt"])
    known = {key: found[key] for key in ("command", "date", "commit", "machine", "seconds", "attention")}
    tables = {"branch_rows": "\n".join(branch_rows(found)), "prompt_rows": "\n".join(prompt_rows(found))}
    sizes = {"branch_size": branch.nbytes / 2**20, "prompt_size": prompt.nbytes / 2**20}
    before, after = found["load"]
    return PAGE.format(branch=branch, prompt=prompt, before=before, after=after, **known, **tables, **sizes)
