"""What a run folder holds: its configuration, and its metrics.jsonl as one history with the numbers a report states, none estimated."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import yaml
from pydantic import ValidationError

from llmtrain.config.fields import root
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.plugins import load_plugins
from llmtrain.train.metrics import read_metrics

SMOOTHING = 0.05  # final loss: mean over this share of the steps, at least FINAL_STEPS
FINAL_STEPS = 20


def read_config(folder: Path) -> RunConfig | None:
    """The configuration in a run folder's config.yaml, None if there is none. Raises UserError if this version cannot read it."""
    path = Path(folder) / "config.yaml"
    if not path.exists():
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        load_plugins(values.get("plugins") or [])
        return root().model_validate(values)
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path} is not a configuration that this version reads: {str(error).splitlines()[0]}") from error


@dataclass
class History:
    """Lines in step order. Where a run was resumed from before its last line, or started anew, the later lines count."""

    train: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    shares: list[dict] = field(default_factory=list)
    """Lines that say how the experts' layers shared out tokens."""

    @classmethod
    def read(cls, folder: Path) -> "History":
        """The history of a run folder. Raises UserError if it holds no metrics or not one step."""
        path = Path(folder) / "metrics.jsonl"
        if not path.exists():
            raise UserError(f"{folder} is no run folder: it has no metrics.jsonl")
        history = cls()
        for line in read_metrics(path):
            history._add(line)
        if not history.train:
            raise UserError(f"{path} holds no training step yet")
        return history

    def _add(self, line: dict) -> None:
        kind, step = line.get("kind"), line.get("step", 0)
        if kind == "train":
            if self.train and step <= self.train[-1]["step"]:
                self.train = [old for old in self.train if old["step"] < step]
                self.validation = [old for old in self.validation if old["step"] < step]
                self.shares = [old for old in self.shares if old["step"] < step]
            self.train.append(line)
        elif kind == "validation":
            self.validation.append(line)
        elif kind == "experts":
            self.shares.append(line)
        elif kind == "event":
            self.events.append(line)

    def column(self, name: str) -> list[float]:
        """The finite values of a column of the training lines."""
        return [line[name] for line in self.train if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])]

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a training column; a value that is missing or not finite is NaN."""
        values = [line.get(name) for line in self.train]
        return [line["step"] for line in self.train], [float("nan") if v is None or not math.isfinite(v) else v for v in values]

    def sources(self) -> dict[str, list[dict]]:
        """Validation lines by source, in the order of first appearance."""
        found: dict[str, list[dict]] = {}
        for line in self.validation:
            found.setdefault(line["source"], []).append(line)
        return found

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.train[-1]["step"]

    @property
    def complete(self) -> bool:
        """Whether every step has a line (metrics.every is 1)."""
        return len(self.train) == self.steps

    def seconds(self) -> float:
        """Seconds of the recorded steps, without validation and checkpoints."""
        return math.fsum(self.column("seconds"))

    def tokens_per_second(self) -> float | None:
        """Tokens per second of all recorded steps but the first, which warms up; the median of the lines if no two steps are neighbours."""
        neighbours = [(a, b) for a, b in pairwise(self.train) if b["step"] == a["step"] + 1]
        if neighbours:
            seconds = math.fsum(b["seconds"] for _, b in neighbours)
            return sum(b["tokens"] - a["tokens"] for a, b in neighbours) / max(1e-9, seconds)
        speeds = self.column("tokens_per_second")
        return median(speeds) if speeds else None

    def final_loss(self) -> tuple[float, int]:
        """Mean training loss (nats/token) of the last finite lines, and how many they are."""
        losses = self.column("loss")
        count = min(len(losses), max(FINAL_STEPS, round(SMOOTHING * len(losses))))
        return (fmean(losses[-count:]), count) if count else (math.nan, 0)

    def total(self, name: str) -> int:
        """Sum of a 0/1 column."""
        return int(sum(self.column(name)))
