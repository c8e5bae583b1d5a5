"""Results as a table in Markdown and a plot."""

from collections.abc import Sequence
from pathlib import Path

from job import BIGMAC, FINE, KINDS, RATIO, TOP_K, Arm, Size, values
from measure import INFERENCE, TOKENS, TRAINING, Measured, median, share

from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.config.run import RunConfig

PAPER = {4: "1.53-2.41", 8: "2.45-3.07"}
"""Training steps of Megatron, GPT3-Medium to 6.7B."""
PAPER_XL = {4: (2.37, 3.48), 8: (2.95, 3.72)}
"""GPT3-XL with ep 32: the step, and the all-to-alls alone."""
PAPER_GENERATION = {4: (2.81, 2.50, 2.03, 1.62), 8: (3.11, 2.89, 2.41, 1.99)}
"""DeepSpeed-Inference with ep 16, prompts of 128, by TOKENS."""


def ceiling(part: float) -> float:
    """How much faster a step becomes if all-to-alls, `part` of it, take r of their time and nothing else changes."""
    return 1 / (1 - part * (1 - RATIO))


def ratio(found: dict, key: str = "step") -> float:
    """Of medians: fine-grained over BigMac."""
    return median(found[FINE], key) / median(found[BIGMAC], key)


def seconds(measured: Sequence[Measured]) -> str:
    """`median (lowest-highest)`."""
    steps = [one["step"] for one in measured]
    return f"{median(measured, 'step'):.2f} ({min(steps):.2f}-{max(steps):.2f})"


def costs(results: dict) -> str:
    """A row per top-k: what BigMac adds, in closed form, and what it takes away."""
    size, ranks = Size(**results["size"]), results["ranks"]
    rows = ["| | parameters | FLOPs of a step | bytes of its all-to-alls |", "|---|---|---|---|"]
    for top_k in TOP_K:
        models = [RunConfig.model_validate(values(Arm(kind, top_k), size, ranks=ranks)).model for kind in KINDS]
        parameters = [count_parameters(model)["total"] for model in models]
        flops = [flops_per_token(model, size.length) * ranks * size.sequences * size.length / 1e9 for model in models]
        found = results["training"][str(top_k)]["paper"]
        sent = [median(found[kind], "rows") / 2**20 for kind in KINDS]
        cells = (change(*parameters, ",.0f"), change(*flops, ".1f", " G"), change(*sent, ".1f", " MiB"))
        rows.append(f"| top-{top_k} | {' | '.join(cells)} |")
    rows.append("| paper, top-8 | 3.73 B -> 3.78 B, +1.35% | 3,490.67 T -> 3,649.00 T, +4.54% | 1,488 GiB -> 372 GiB, -75% |")
    return "\n".join(rows)


def change(fine: float, bigmac: float, form: str, unit: str = "") -> str:
    """`from -> to, by`."""
    return f"{fine:{form}}{unit} -> {bigmac:{form}}{unit}, {bigmac / fine - 1:+.2%}"


def training(results: dict) -> str:
    """A row per top-k at the paper's share."""
    rows = [
        "| | wire | all-to-all share, fine-grained (paper) | s/step fine-grained | s/step BigMac | BigMac is faster by "
        "| ceiling at that share (at the paper's) | paper: range, GPT3-XL | all-to-alls alone (paper, GPT3-XL) |",
        "|" + "---|" * 9,
    ]
    for top_k in TOP_K:
        found = results["training"][str(top_k)]["paper"]
        part, (step, alone) = share(found[FINE]), PAPER_XL[top_k]
        rows.append(
            f"| top-{top_k} | {found['rate'] / 1e6:.1f} Mbit/s | {part:.1%} ({TRAINING[top_k]:.1%}) | {seconds(found[FINE])} "
            f"| {seconds(found[BIGMAC])} | **{ratio(found):.2f}x** | {ceiling(part):.2f}x ({ceiling(TRAINING[top_k]):.2f}x) "
            f"| {PAPER[top_k]}x, {step}x | {ratio(found, 'exchange'):.2f}x ({alone}x) |"
        )
    return "\n".join(rows)


def parts(results: dict) -> str:
    """A row per arm: seconds in all-to-alls and outside them."""
    rows = ["| | no limit: all-to-alls, rest | on the wire above: all-to-alls, rest |", "|---|---|---|"]
    for top_k in TOP_K:
        found = results["training"][str(top_k)]
        for kind in KINDS:
            pairs = [(median(of[kind], "exchange"), median(of[kind], "step")) for of in (found["sweep"][0], found["paper"])]
            rows.append(f"| {kind} top-{top_k} | {' | '.join(f'{a:.2f} s, {step - a:.2f} s' for a, step in pairs)} |")
    return "\n".join(rows)


def traffic(results: dict) -> str:
    """A row per arm: bytes of a step over all ranks."""
    rows = [
        "| | rows of the experts, bytes | of fine-grained | other traffic, bytes | by the interfaces, less other traffic | of the rows |",
        "|" + "---|" * 6,
    ]
    for top_k in TOP_K:
        found = results["training"][str(top_k)]["paper"]
        for kind in KINDS:
            rows_sent, others, all_sent = (median(found[kind], key) for key in ("rows", "others", "interface"))
            part = "" if kind == FINE else f"{rows_sent / median(found[FINE], 'rows'):.4f}"
            rows.append(
                f"| {kind} top-{top_k} | {rows_sent:,.0f} | {part} | {others:,.0f} | {all_sent - others:,.0f} "
                f"| {(all_sent - others) / rows_sent:.2%} |"
            )
    return "\n".join(rows)


def sweep(results: dict) -> str:
    """A row per speed of the wire."""
    rows = ["| wire | " + " | ".join(f"top-{k}: share, s/step fine-grained, BigMac | faster by" for k in TOP_K) + " |", "|" + "---|" * 5]
    for at, point in enumerate(results["training"][str(TOP_K[0])]["sweep"]):
        cells = ["no limit" if point["rate"] is None else f"{point['rate'] / 1e6:.0f} Mbit/s"]
        for top_k in TOP_K:
            found = results["training"][str(top_k)]["sweep"][at]
            cells += [f"{share(found[FINE]):.1%}, {seconds(found[FINE])}, {seconds(found[BIGMAC])}", f"{ratio(found):.2f}x"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def generation(results: dict) -> str:
    """A row per top-k: how much faster prompts and so many new tokens are."""
    heads = " | ".join(f"{n} new (paper)" for n in TOKENS)
    rows = [
        f"| | wire | share, prompts (paper) | {heads} | prompts: s, fine-grained and BigMac | a token after them: ms | its share |",
        "|" + "---|" * (6 + len(TOKENS)),
    ]
    for top_k in TOP_K:
        found = results["inference"][str(top_k)]
        spent = {kind: [[sum(one["step"] for one in run[:n]) for run in found[kind]] for n in TOKENS] for kind in KINDS}
        middle = {kind: [sorted(of)[len(of) // 2] for of in spent[kind]] for kind in KINDS}
        gains = [f"{a / b:.2f}x ({c}x)" for a, b, c in zip(middle[FINE], middle[BIGMAC], PAPER_GENERATION[top_k])]
        prompts = {kind: [run[0] for run in found[kind]] for kind in KINDS}
        after = {kind: [one for run in found[kind] for one in run[1:]] for kind in KINDS}
        fill = ", ".join(f"{median(prompts[kind], 'step'):.3f}" for kind in KINDS)
        token = ", ".join(f"{1000 * median(after[kind], 'step'):.1f}" for kind in KINDS)
        rows.append(
            f"| top-{top_k} | {found['rate'] / 1e6:.1f} Mbit/s | {share(prompts[FINE]):.1%} ({INFERENCE[top_k]:.1%}) | {' | '.join(gains)} "
            f"| {fill} | {token} | {share(after[FINE]):.1%} |"
        )
    return "\n".join(rows)


def plot(results: dict, path: Path) -> None:
    """Speed-up over the speed of the wire, and over the share of all-to-alls beside the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    for top_k, color in zip(TOP_K, plt.cm.tab10.colors):
        found = results["training"][str(top_k)]
        points = [point for point in found["sweep"] if point["rate"] is not None]
        left.plot([p["rate"] / 1e6 for p in points], [ratio(p) for p in points], "o-", color=color, label=f"top-{top_k}")
        left.plot(
            [found["paper"]["rate"] / 1e6], [ratio(found["paper"])], "*", ms=14, color=color, label=f"top-{top_k} at the paper's share"
        )
        left.axhline(ratio(found["sweep"][0]), color=color, ls=":", lw=1, label=f"top-{top_k}, no limit")
        every = [*found["sweep"], found["paper"]]
        right.plot([share(p[FINE]) for p in every], [ratio(p) for p in every], "o", color=color, label=f"top-{top_k}, here")
        right.plot([TRAINING[top_k]], [PAPER_XL[top_k][0]], "D", mfc="none", color=color, label=f"top-{top_k}, paper (GPT3-XL, ep 32)")
        low, high = map(float, PAPER[top_k].split("-"))
        right.vlines(TRAINING[top_k], low, high, color=color, lw=1)
    shares = [at / 100 for at in range(97)]
    right.plot(shares, [ceiling(part) for part in shares], "k-", lw=1, label="ceiling 1 / (1 - 0.75 share)")
    left.set_xscale("log")
    speeds = [point["rate"] / 1e6 for point in points]
    left.set_xticks(speeds, [f"{speed:g}" for speed in speeds])
    left.minorticks_off()
    left.set(xlabel="speed of the wire (Mbit/s)", ylabel="step of fine-grained / BigMac", title="speed of the network")
    right.set(xlabel="all-to-all share of a fine-grained step", ylabel="step of fine-grained / BigMac", title="share of the all-to-alls")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(results: dict, path: Path) -> None:
    """The Markdown and the plot beside `path`, the JSON of the results."""
    size, (before, after) = results["size"], results["load"]
    plot(results, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(
        f"""# Results

`{results["command"]}`, {results["date"]}, commit {results["commit"][:10]}, {results["seconds"] / 60:.0f} minutes on {results["machine"]};
load average {before:.1f} before and {after:.1f} after (the job's own {results["ranks"]} ranks included).

{results["ranks"]} ranks (ep = dp_shard = {results["ranks"]}), {size["layers"]} layers of width {size["hidden"]}, float32;
{size["experts"]} experts of 2 x {size["hidden"]} x {int(RATIO * size["hidden"])} weights.
{size["sequences"]} sequences of {size["length"]} tokens a rank and step. Medians; lowest and highest in brackets.

## What BigMac adds

{costs(results)}

## A training step at the paper's share of all-to-alls

{training(results)}

{parts(results)}

## Bytes of such a step, over all ranks

{traffic(results)}

## Over the speed of the wire

{sweep(results)}

![over the speed of the wire]({path.with_suffix(".png").name})

## Generation: prompts of {size["length"]} tokens, {size["sequences"]} a rank

{generation(results)}
"""
    )
    print(path.with_suffix(".md").read_text())
