"""The part of a report that is about mixtures of experts: how evenly each layer used them over the run, as a table and as a heat map."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from llmtrain.tools.history import FINAL_STEPS, History
from llmtrain.tools.markdown import fence, table
from llmtrain.tools.report_plot import sparkline

PLOT = "experts.png"
ROWS = 16
"""Layers of the table at most: the worst ones."""
IDLE = 0.1
"""An expert with less than this part of the even share is called idle."""


@dataclass(frozen=True)
class ExpertHistory:
    """What a run recorded of its experts; L layers from block `first` on."""

    first: int
    steps: list[int]
    columns: dict[str, list[list[float]]]
    """load, entropy, dropped, bias, as far as they were recorded: for each of `steps` the values of the L layers."""
    shares: list[list[float]]
    """Of each layer the share of every expert at the end; [] where that is not recorded."""

    @classmethod
    def of(cls, history: History) -> "ExpertHistory | None":
        """What `history` knows; None for a model without experts, and for a run that did not record them."""
        lines = [line for line in history.train if isinstance(line.get("experts"), dict) and line["experts"].get("load")]
        if not lines:
            return None
        last = lines[-1]["experts"]
        layers, names = len(last["load"]), [name for name, values in last.items() if isinstance(values, list)]
        lines = [line for line in lines if all(len(line["experts"].get(name, ())) == layers for name in names)]
        columns = {name: [line["experts"][name] for line in lines] for name in names}
        shares = history.shares[-1]["shares"] if history.shares and len(history.shares[-1]["shares"]) == layers else []
        return cls(last.get("first_layer", 0), [line["step"] for line in lines], columns, shares)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.columns["load"][-1])

    def ending(self, name: str, layer: int) -> float | None:
        """Mean of the last steps."""
        return fmean(values[layer] for values in self.columns[name][-FINAL_STEPS:]) if name in self.columns else None


def experts_section(history: History, folder: Path, *, header: str = "## Experts") -> str:
    """The section, with the heat map in `folder`; "" without experts."""
    found = ExpertHistory.of(history)
    if found is None:
        (folder / PLOT).unlink(missing_ok=True)
        return ""
    order = sorted(range(found.layers), key=lambda layer: -found.ending("load", layer))[:ROWS]
    rows = [_row(found, layer) for layer in sorted(order)]
    names = ("layer", "load", "highest load", "entropy", "dropped", "norm of the bias", "fullest expert", "idle experts")
    kept = [at for at in range(len(names)) if any(row[at] is not None for row in rows)]
    shown = table([names[at] for at in kept], [["" if row[at] is None else row[at] for at in kept] for row in rows])
    of = f"Of the {found.layers} layers the {ROWS} least even ones. " if found.layers > ROWS else ""
    means = (
        f"Means of the last {min(FINAL_STEPS, len(found.steps))} recorded steps. {of}Load: tokens of the fullest expert over the mean (1 "
    )
    means += "is even). Entropy: of the experts' shares, over that of equal ones."
    if found.shares:
        means += f" Idle: less than {IDLE:g} of the even share at the end."
    return "\n\n".join([header, means, shown, _picture(found, folder)])


def _row(found: ExpertHistory, layer: int) -> list[str | None]:
    peak, step = max((values[layer], -step) for step, values in zip(found.steps, found.columns["load"]))
    row = [str(layer + found.first), f"{found.ending('load', layer):.2f}", f"{peak:.2f} (step {-step:,})"]
    row.append(f"{found.ending('entropy', layer):.3f}")
    dropped, bias = found.ending("dropped", layer), found.ending("bias", layer)
    row += [None if dropped is None else f"{100 * dropped:.2f}%", None if bias is None else f"{bias:.3g}"]
    if not found.shares:
        return [*row, None, None]
    shares = found.shares[layer]
    fullest = max(range(len(shares)), key=lambda expert: shares[expert])
    idle = sum(share * len(shares) < IDLE for share in shares)
    return [*row, f"{fullest} ({100 * shares[fullest]:.1f}%)", f"{idle} of {len(shares)}"]


def _picture(found: ExpertHistory, folder: Path) -> str:
    from llmtrain.tools.report_experts_plot import draw_experts

    try:
        draw_experts(found, folder / PLOT)
    except ImportError:
        (folder / PLOT).unlink(missing_ok=True)  # a plot of an earlier state would pass for this one
        return f"Load of each layer over the steps:\n\n{fence(text_map(found))}"
    return f"![load of each layer over the steps, and every expert's share at the end]({PLOT})"


def text_map(found: ExpertHistory) -> str:
    """A line of bars for each layer, all on one scale from 1, even, to the highest load of the run."""
    loads = found.columns["load"]
    top = max(2.0, *(max(values) for values in loads))
    lines = [sparkline([values[layer] for values in loads], low=1.0, high=top) for layer in range(found.layers)]
    width = len(str(found.first + found.layers - 1))
    return "\n".join([f"{layer + found.first:>{width}} {line}" for layer, line in enumerate(lines)] + [f"from 1 to {top:.3g}"])
