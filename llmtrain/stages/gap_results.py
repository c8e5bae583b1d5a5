"""Results of `llmtrain gap`: one JSON line per text, so that a sweep goes on where it was stopped."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError

FILE = "results.jsonl"
NUMBERS = ("model", "tokenizer", "optim", "schedule", "train", "precision", "seed")
"""Sections of the configuration that make a run's numbers; a sweep goes on only with the same."""
SIZES = ("texts", "control", "select")
"""Options of `gap` that may change between two commands: more texts may follow."""


def lower_is_better(name: str) -> bool:
    """Whether the scores of an evaluation of this name are losses."""
    return name.startswith("nats ")


class Results:
    """The file's lines: a `setup`, the `base` model's scores, then a `run` per text. Written whole and renamed, so a kill loses nothing."""

    def __init__(self, folder: Path, cfg: RunConfig):
        self.path, self._setup = folder / FILE, setup(cfg)
        self.base: dict[str, list[float]] | None = None
        self.runs: dict[str, dict] = {}
        """Finished runs by their text's key, in the order in which they were made."""

    def load(self) -> None:
        """Take up what an earlier command left. Raises UserError if that was made with other settings."""
        for line in read(self.path) if self.path.exists() else []:
            if line["kind"] == "setup":
                self._require_same(line["values"])
            elif line["kind"] == "base":
                self.base = line["scores"]
            else:
                self.runs[line["key"]] = line

    def _require_same(self, earlier: dict[str, Any]) -> None:
        changed = sorted(key for key in self._setup.keys() | earlier.keys() if self._setup.get(key) != earlier.get(key))
        if changed:
            what = "; ".join(f"{key} was {earlier.get(key)}, is {self._setup.get(key)}" for key in changed[:3])
            raise UserError(f"{self.path} was made with other settings ({what}); undo that, or choose another name (`--name`)")

    def write(self) -> None:
        """Replace the file by what is known now."""
        lines = [{"kind": "setup", "values": self._setup}]
        lines += [] if self.base is None else [{"kind": "base", "scores": self.base}]
        fresh = self.path.with_name(f".{self.path.name}.new")
        fresh.write_text("".join(json.dumps(_plain(line)) + "\n" for line in [*lines, *self.runs.values()]), encoding="utf-8")
        fresh.replace(self.path)


def _plain(value: Any) -> Any:
    """`value` as strict JSON: numbers that are none become strings, which `float` reads again."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict]:
    """The lines of a results file. Raises UserError if it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        known = all(line["kind"] in ("setup", "base", "run") for line in lines)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path}: is no file of results that `llmtrain gap` wrote")
    return lines


def setup(cfg: RunConfig) -> dict[str, Any]:
    """What defines the numbers of a run, flat; of files their content."""
    values = cfg.model_dump(mode="json")
    values["train"].pop("global_batch")  # follows from the mesh
    gap = {key: value for key, value in values["gap"].items() if key not in SIZES}
    flat = {name: _short(values[name]) for name in NUMBERS} | {f"gap.{key}": _short(value) for key, value in gap.items()}
    files = [gap["dialogue"]["file"], *gap["perplexity"]["texts"], *gap["tasks"]["names"]]
    return flat | {f"content of {file}": _digest(Path(file)) for file in files if file and Path(file).is_file()}


def _short(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) < 400 else hashlib.sha256(text.encode()).hexdigest()[:12]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
