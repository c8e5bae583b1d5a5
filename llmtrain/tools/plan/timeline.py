"""A picture of the pipeline: what every rank does when. Needs matplotlib (the extra `viz`)."""

from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.simulate.events import Simulated

COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#f58518", "W": "#eeca3b"}
WORDS = {"F": "forward", "B": "backward", "I": "backward for inputs", "W": "backward for weights"}


def draw(found: Simulated, path: Path) -> None:
    """Write the timeline as SVG or PNG, by the file's ending. Raises UserError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError as error:
        raise UserError(f"--timeline needs matplotlib: pip install llmtrain[viz] ({error})") from None
    ranks = len(found.spans)
    figure, axes = pyplot.subplots(figsize=(12, 1 + 0.32 * ranks))
    kinds = set()
    for rank, spans in enumerate(found.spans):
        for span in spans:
            width = (span.end - span.start) / len(span.action.flat())
            for at, part in enumerate(span.action.flat()):
                kinds.add(part.kind)
                axes.barh(rank, width, left=span.start + at * width, height=0.9, color=COLOURS[part.kind], edgecolor="white", linewidth=0.2)
    axes.set_yticks(range(ranks), [f"pp {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds of a step of {found.step.seconds:.3g} s; white is waiting ({found.step.bubble:.1%})")
    axes.legend(handles=[Patch(color=COLOURS[kind], label=WORDS[kind]) for kind in sorted(kinds)], loc="upper right", ncols=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
