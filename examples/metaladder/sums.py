"""The model that the arms begin with: it has read sums, as a pretrained model has, and no problem.

Without it a small model spends its examples on the tables of arithmetic: of one that was trained on 1,000 problems alone, four answers of
five began with the right numbers, and one of twenty-five was free of false sums.
"""

from pathlib import Path
from random import Random

from llmtrain.data.metaladder.stories import STORIES
from llmtrain.data.metaladder.structures import OPERATIONS

LINES = 16_000


def line(draw: Random, things: list[str], *, largest: int) -> str:
    """Some numbers, then sums with them in their order, each of the result before, as solutions write them: all of 2..largest."""
    numbers = range(2, largest + 1)
    value, thing = draw.choice(numbers), draw.choice(things)
    given, sums = [value], []
    for _ in range(draw.randint(1, 3)):
        possible = [(name, b, c) for name, compute in OPERATIONS.items() for b in numbers if (c := compute(value, b)) in numbers]
        operation, number, result = draw.choice(possible)
        sums.append(f"{value} {operation} {number} = {result} {thing}.")
        given.append(number)
        value = result
    return f"{', '.join(map(str, given))}: {' '.join(sums)} The answer is {value}."


def write(path: Path, *, largest: int) -> None:
    """A document a line."""
    draw, things = Random(0), sorted({thing for story in STORIES for thing in story.things})
    path.write_text("\n".join(line(draw, things, largest=largest) for _ in range(LINES)) + "\n", encoding="utf-8")


def base_model(data: Path, output: Path, *, config: Path, largest: int, options: dict) -> Path:
    """The run folder of the model, trained unless it is there."""
    from llmtrain import run
    from llmtrain.config.run import RunConfig
    from llmtrain.config.yamlfile import inline
    from llmtrain.tools import data as verb

    if not (data / "sums.bin").exists():
        write(data / "sums.txt", largest=largest)
        words = ["--input", str(data / "sums.txt"), "--split", "line", "--tokenizer", str(data / "tokenizer.model"), "--workers", "1"]
        verb.main(["tokenize", *words, "--out", str(data / "sums")])
    paths = {"output": str(output), "tokenizer.path": str(data / "tokenizer.model"), "data.train": [str(data / "sums")]}
    cfg = RunConfig.load(config, [f"--{name}={inline(value)}" for name, value in (options | paths).items()])
    if not (output / cfg.name / "report.md").exists() and not (result := run(cfg)).done:
        raise SystemExit(f"{cfg.name} ended with exit code {int(result)}; started again, this goes on there")
    return output / cfg.name
