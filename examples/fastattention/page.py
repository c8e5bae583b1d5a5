"""The results page."""

from counts import EDGE, LENGTH, CountsFound, MaskFound
from paper import CLAIMS, TRUST

from llmtrain.tools.markdown import fence, table

NOT_MEASURED = {
    "speed_ascend": "an Ascend NPU",
    "speed_llama": "an Ascend NPU",
    "speed_volta": "a V100",
    "speed_pangu": "V100s; the model is not public",
    "speed_host": "a GPU",
}
"""Claim -> what a measurement would need."""

MIB = 1 << 20


def page(found: dict) -> str:
    """Everything, in Markdown."""
    parts = [
        "# FastAttention: what the paper claims, and what was found here",
        "`{command}`, {date}, commit {commit:.7}. {machine}, load {load[0]:.1f} before and {load[1]:.1f} after; "
        "{seconds:.0f} s. No accelerator took part.".format(**found),
        "## Claim by claim",
        table(["claim", "known from", "found here", "on what"], [_row(claim, found) for claim in CLAIMS]),
        "\n".join(f"- {name}: {meaning}." for name, meaning in TRUST.items()),
        f"## Tiles of one head of 128, {found['length']:,} tokens, forward",
        table(COUNTS, map(_counts_row, found["counts"])),
        "## Memory held at the peak, forward and backward without inputs, one head of 64, fp32, causal",
        table(["tokens", "reference, MiB", "per token, bytes", "softmax with all scores, MiB"], map(_held_row, found["held"])),
        f"## Against the formula in float64, numbers drawn from seed {found['seed']}",
        "Largest error of the output and of the gradients, each relative to the largest number of its tensor (at least 1/4); the bound\n"
        "is that of the tests. Mask: whether exactly its pairs of query and key take part, forward and backward.",
        table(["implementation", "dtype", "calls", "output", "gradients", "bound", "mask"], map(_numbers_row, found["numbers"]["rows"])),
        "## Sums in tiles (Tiling-AllReduce)",
        found["bench"] or NO_BENCH,
        "## 256K tokens on 8 V100 of 32 GB",
        "By arithmetic, for a model whose shape is assumed (docs/long-generation.md); no V100 has run it.",
        fence(found["plan"]),
        "## Compiled for chips that are not here",
        "\n".join(f"- {name}: {line}" for name, lines in found["compiled"].items() for line in lines),
    ]
    return "\n\n".join(parts) + "\n"


NO_BENCH = "The bench of their overlap has not been run here (`sudo .venv/bin/python bench/tiled_reduce.py`)."

COUNTS = [
    "mask",
    "small tiles computed",
    "skipped",
    "masked",
    "hand-overs, two levels",
    "one level",
    "memory to L1, MiB, two levels",
    "one level",
]


def _counts_row(row: CountsFound) -> list[str]:
    two, one = row.two, row.one
    tiles = [f"{number:,}" for number in (two.small_visited, two.small_skipped, two.small_masked, two.hand_overs, one.hand_overs)]
    return [row.name, *tiles, *(f"{each.moved['memory > L1'] / MIB:.1f}" for each in (two, one))]


def _held_row(row: tuple[int, int, int | None]) -> list[str]:
    tokens, tiled, scores = row
    return [f"{tokens:,}", f"{tiled / MIB:.1f}", f"{tiled / tokens:,.0f}", "not run" if scores is None else f"{scores / MIB:.1f}"]


def _numbers_row(row: dict) -> list[str]:
    names = [row["name"], row["dtype"], f"{row['served']} of {row['of']}"]
    if "why" in row:
        return [*names, row["why"], "", "", ""]
    mask = "; ".join(row["wrong_bits"]) or "every pair right"
    return [*names, *(f"{row[part]:.1e}" for part in ("out", "gradients")), f"{row['bound']:.0e}", mask]


def beyond(numbers: dict) -> list[str]:
    """Implementations whose error is above its bound, or whose mask is wrong."""
    ran = [row for row in numbers["rows"] if "why" not in row]
    return [f"{row['name']} in {row['dtype']}" for row in ran if max(row["out"], row["gradients"]) > row["bound"] or row["wrong_bits"]]


def _row(claim, found: dict) -> list[str]:
    if claim.key in NOT_MEASURED:
        return [claim.text, claim.trust, f"not measured: no such hardware here ({NOT_MEASURED[claim.key]})", ""]
    return [claim.text, claim.trust, *FINDINGS[claim.key](found)]


def _hand_overs(found: dict) -> tuple[str, str]:
    two, one = _causal(found).two, _causal(found).one
    fewer, moved = one.hand_overs / two.hand_overs, one.moved["memory > L1"] / two.moved["memory > L1"]
    text = f"{fewer:.1f} times fewer hand-overs ({two.hand_overs} for {one.hand_overs}), {moved:.1f} times fewer bytes to L1"
    return text, f"counted in the reference, causal, {found['length']:,} tokens; no Ascend core has run it"


def _mask(found: dict) -> tuple[str, str]:
    sizes: MaskFound = found["mask"]
    text = (
        f"{sizes.dense / 2**30:g} GiB dense, {sizes.tiled / MIB:g} MiB tiled at {LENGTH:,} tokens, M = {EDGE}, fp16; "
        f"all {sizes.blocks} blocks at {sizes.length:,} tokens are those of the dense mask, {sizes.views} of them views without a copy"
    )
    return text, "bytes of the tensors (the dense one at 64K described, not filled); bits compared on this CPU"


def _skipped(found: dict) -> tuple[str, str]:
    two = _causal(found).two
    tiles = two.small_skipped + two.small_visited
    text = f"{two.small_skipped:,} of {tiles:,} small tiles skipped ({two.small_skipped / tiles:.0%}), causal"
    return text, f"counted in the reference, {found['length']:,} tokens"


def _memory(found: dict) -> tuple[str, str]:
    (_, before, _), (_, middle, _), (tokens, last, _) = found["held"][-3:]
    factor = (last - middle) / (middle - before)
    text = f"{last / MIB:.1f} MiB at {tokens:,} tokens; its last doubling added {factor:.2f} times the one before (linear: 2, square: 4)"
    return text, "the reference on this CPU, measured at torch's operators"


def _numbers(found: dict) -> tuple[str, str]:
    ran = [row for row in found["numbers"]["rows"] if "why" not in row]
    names = ", ".join(dict.fromkeys(row["name"] for row in ran))
    wrong = beyond(found["numbers"])
    return f"ABOVE their bounds: {', '.join(wrong)}" if wrong else "all within their bounds of float64", f"{names}, on this CPU"


def _volta(found: dict) -> tuple[str, str]:
    numbers = found["numbers"]
    if not numbers["launches"]:
        return "not run here: it needs g++ (and is left out with --quick)", ""
    text = f"{numbers['conflicts']:,} conflicts in {numbers['accesses']:,} accesses of warps in {numbers['launches']:,} launches"
    return text, "the CUDA source in a host shim on this CPU, by the usual rule of banks; no V100 has run it"


def _reduce(found: dict) -> tuple[str, str]:
    overlap = "see below" if found["bench"] else "the bench has not been run here"
    text = f"in tiles and halves of the heads as in one piece, to {found['reduced']:.0e}; overlap: {overlap}"
    return text, "one process in float64; overlap: two ranks over gloo"


def _length(found: dict) -> tuple[str, str]:
    return _planned(found, "on the host", "longest sequence"), "arithmetic, a shape that is assumed; no V100 has run it"


def _length_before(found: dict) -> tuple[str, str]:
    return f"{_planned(found, 'longest sequence')}; where it differs, we do not know why", "the same"


def _planned(found: dict, *starts: str) -> str:
    return "; ".join(line for line in found["plan"].splitlines() if line.startswith(starts))


def _causal(found: dict) -> CountsFound:
    return next(row for row in found["counts"] if row.name == "causal")


FINDINGS = {
    "hand_overs": _hand_overs,
    "mask": _mask,
    "skipped": _skipped,
    "memory": _memory,
    "numbers": _numbers,
    "volta": _volta,
    "reduce": _reduce,
    "length": _length,
    "length_before": _length_before,
}
"""Claim -> (what was found, on what)."""
