"""Which engine runs on which device: each cell is tested, or not run on hardware yet, or refused with the reason.

`python -m llmtrain.engine.support` prints the table of docs/engines.md.
"""

from dataclasses import dataclass

DEVICES = ("cpu", "cuda", "npu")


@dataclass(frozen=True)
class Cell:
    """One engine on one kind of device."""

    text: str
    """What was run, and by which command; or why it is refused."""
    refused: bool = False


SUPPORT: dict[str, dict[str, Cell]] = {
    "native": {
        "cpu": Cell("tested: `make test`"),
        "cuda": Cell("not run on hardware"),
        "npu": Cell("tested over the stand-in for CANN: `make test-npu`; not run on hardware"),
    },
    "deepspeed": {
        "cpu": Cell("tested: ZeRO 0 to 3 on 1, 2 and 4 ranks, `make test-engines`"),
        "cuda": Cell("not run on hardware"),
        "npu": Cell("tested over the stand-in: ZeRO 1 to 3 in fp32 on 2 ranks, `make test-npu`; not run on hardware"),
    },
    "megatron": {
        "cpu": Cell("megatron-core asks for CUDA, for which its tests stand in (`make test-engines`); set engine native", refused=True),
        "cuda": Cell("not run on hardware"),
        "npu": Cell(
            "not run there, and MindSpeed pins megatron-core 0.12.1; parameters are the same, so that checkpoints carry over; "
            "set engine native",
            refused=True,
        ),
    },
}
"""Cells by engine and device."""


def refusal(engine: str, device: str) -> str | None:
    """Why the engine does not run on the kind of device; None if it does, or is not of this package."""
    cell = SUPPORT.get(engine, {}).get(device)
    return f"engine {engine} on {device}: {cell.text}" if cell is not None and cell.refused else None


def table() -> str:
    """The table, in Markdown."""
    head = ["engine", *DEVICES]
    rows = [
        [f"`{engine}`", *(f"{'refused: ' if cells[device].refused else ''}{cells[device].text}" for device in DEVICES)]
        for engine, cells in SUPPORT.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(table())
