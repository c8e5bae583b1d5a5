"""`llmtrain plan shapes`: which shape of a model trains fastest at one size, on the run's mesh."""

import argparse

from llmtrain.errors import UserError
from llmtrain.simulate.rates import fitted
from llmtrain.simulate.shape_search import Axes, Shape, shapes
from llmtrain.tools.plan.verb import add_run, asked

GIB = 2**30


def main(argv: list[str]) -> int:
    """Rank and print; returns 0."""
    options, overrides = parser().parse_known_args(argv)
    cfg, hardware, devices = asked(options, overrides)
    axes = Axes(
        *(_numbers(getattr(options, name), name) for name in ("layers", "hidden", "experts", "top_k")), tuple(options.attention or ())
    )
    found = shapes(cfg, hardware, devices, fitted(), axes=axes, budget=options.budget, by=options.by)
    print(f"{len(found)} shapes on {devices:,} x {hardware.key}, {options.by} alike; tokens a second, the fastest first")
    print("\n".join(table(found[: options.show], room=hardware.memory.value)))
    return 0


def table(found: list[Shape], *, room: float) -> list[str]:
    """A line per shape."""
    lines = [f"  {'tokens/s':>12}{'of best':>9}{'MFU':>7}{'B in all':>10}{'active':>8}{'GiB':>7}  shape"]
    for one in found:
        cells = f"{one.tokens:>12,.0f}{one.tokens / found[0].tokens:>9.1%}{one.utilisation:>7.1%}{one.parameters / 1e9:>10.1f}"
        over = "" if one.memory <= room else "  (does not fit)"
        lines.append(f"  {cells}{one.active / 1e9:>8.1f}{one.memory / GIB:>7.1f}  {one.words}{over}")
    return lines


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain plan shapes`."""
    found = argparse.ArgumentParser(
        "llmtrain plan shapes", description="which shape of a model trains fastest at one size, on the run's mesh"
    )
    add_run(found)
    for name, what in (("layers", "depths"), ("hidden", "widths"), ("experts", "experts of a block"), ("top-k", "experts of a token")):
        found.add_argument(f"--{name}", metavar="LIST", help=f"{what} to try, as 57-66 or 7168,7680; the model's own if not given")
    found.add_argument("--attention", nargs="+", choices=("gqa", "mla"), help="kinds of attention to try")
    found.add_argument("--by", choices=("parameters", "active", "flops"), default="parameters", help="what all shapes have alike, to 2%%")
    found.add_argument("--budget", type=float, help="how much of it; the model's own if not given")
    found.add_argument("--show", type=int, default=12, metavar="N", help="how many (default 12)")
    return found


def _numbers(text: str | None, name: str) -> tuple[int, ...]:
    """`57-59` -> 57, 58, 59; `7168,7680` as it is."""
    if not text:
        return ()
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name.replace('_', '-')} {text!r}: numbers as in 57-66 or 7168,7680") from None
    return tuple(number for ends in spans for number in range(ends[0], ends[-1] + 1))
