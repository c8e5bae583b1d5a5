"""Where a run's numbers go."""

import importlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from uuid import uuid4

from llmtrain.config.train import MetricsConfig
from llmtrain.errors import UserError
from llmtrain.train.speed import SpeedMeter as SpeedMeter

Value = float | int | str | list | dict | None


WORST = {"load": max, "entropy": min, "dropped": max, "rank_load": max}
"""What a step's `experts` say of every layer, and which of the layers is the worst."""


class MetricSink(Protocol):
    """Takes lines of metrics; used on rank 0 only."""

    def write(self, step: int, values: dict[str, Value]) -> None:
        """One line after `step` optimizer steps. `values["kind"]` is train, validation, experts or event (docs/run-folder.md)."""

    def close(self) -> None:
        """Nothing more comes."""


class JsonlSink:
    """Appends one JSON object a line to `path` and flushes it. NaN and infinities become strings, so that every line is valid JSON.

    A last line that a crash cut short is removed when the file is opened again. Each line gets `time`, seconds since 1970.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        _cut_partial_line(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: dict[str, Value]) -> None:
        """Append one line."""
        line = {"kind": values.get("kind", "train"), "step": step, **values, "time": round(time.time(), 3)}
        self._file.write(json.dumps(_json_safe(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes TensorBoard event files to `folder`: `train/NAME`, `validation/SOURCE`, and events as text."""

    def __init__(self, folder: Path):
        _require("tensorboard", option="metrics.tensorboard", extra="viz")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: dict[str, Value]) -> None:
        """Add the line's numbers."""
        if values.get("kind") == "event":
            self._writer.add_text("events", str(values["text"]), step)
        for name, value in _scalars(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class _TrackerSink:
    """A tracking service whose module has `log(values, step=)` and `finish()`."""

    def __init__(self, module: ModuleType):
        self._module = module

    def write(self, step: int, values: dict[str, Value]) -> None:
        """Log the line's numbers; events stay in metrics.jsonl."""
        if scalars := _scalars(values):
            self._module.log(scalars, step=step)

    def close(self) -> None:
        """Finish the service's run."""
        self._module.finish()


class WandbSink(_TrackerSink):
    """Logs to the Weights & Biases project `project`; a resumed run folder continues its run there.

    Without an API key and with WANDB_MODE unset it records offline (`wandb sync` uploads later) and says so.
    """

    def __init__(self, project: str, *, folder: Path, run: dict, say: Callable[[str], Any] = print):
        wandb = _require("wandb", option="metrics.wandb", extra="track")
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.api.api_key:
            mode = "offline"
            say(
                f"wandb: no API key, recording offline in {folder}/wandb; `wandb sync` uploads it, WANDB_MODE=online or disabled changes it"
            )
        wandb.init(
            project=project, name=run.get("name"), dir=str(folder), config=run, mode=mode, id=_run_id(folder, "wandb"), resume="allow"
        )
        super().__init__(wandb)


class SwanlabSink(_TrackerSink):
    """Logs to the SwanLab project `project`; a resumed run folder continues its run there when online.

    Without an API key and with SWANLAB_MODE unset it records offline (`swanlab sync` uploads later) and says so.
    """

    def __init__(self, project: str, *, folder: Path, run: dict, say: Callable[[str], Any] = print):
        swanlab = _require("swanlab", option="metrics.swanlab", extra="track")
        mode = os.environ.get("SWANLAB_MODE")
        if mode is None and not swanlab.Settings().api_key:
            mode = "offline"
            say(f"swanlab: no API key, recording offline in {folder}/swanlab; `swanlab sync` uploads it, SWANLAB_MODE changes it")
        resume = {"id": _run_id(folder, "swanlab"), "resume": "allow"} if mode in (None, "online") else {}
        swanlab.init(project=project, name=run.get("name"), log_dir=str(folder / "swanlab"), config=run, mode=mode, **resume)
        super().__init__(swanlab)


def build_sinks(cfg: MetricsConfig, folder: Path, run: dict, *, say: Callable[[str], Any] = print) -> list[MetricSink]:
    """The sinks that `cfg` asks for, writing to the run folder; call on rank 0. `run` is the configuration as plain data.

    Raises UserError naming the option when its package is missing.
    """
    sinks: list[MetricSink] = [JsonlSink(folder / "metrics.jsonl")]
    if cfg.tensorboard:
        sinks.append(TensorBoardSink(folder / "tb"))
    if cfg.wandb:
        sinks.append(WandbSink(cfg.wandb, folder=folder, run=run, say=say))
    if cfg.swanlab:
        sinks.append(SwanlabSink(cfg.swanlab, folder=folder, run=run, say=say))
    return sinks


def worst(experts: dict[str, Any] | None) -> dict[str, float]:
    """Of a step's `experts` those of the worst layer: the fullest expert's tokens over the mean, the entropy, the share dropped,
    and with parallel.expert_placement the fullest rank's tokens over the mean."""
    return {name: pick(experts[name]) for name, pick in WORST.items() if experts and experts.get(name)}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl in order, non-finite numbers as floats again; a last line cut short is passed over.

    Raises UserError for a broken line elsewhere.
    """
    lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a sample may hold what splitlines takes for an end
    result = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is no JSON ({error.msg}); the file was changed by something else than llmtrain") from error
        result.append({name: _NUMBERS.get(value, value) if isinstance(value, str) else value for name, value in values.items()})
    return result


_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _json_safe(value):
    if isinstance(value, float) and not math.isfinite(value):
        return _NAMES.get(value, "NaN")
    if isinstance(value, dict):
        return {name: _json_safe(item) for name, item in value.items()}
    return [_json_safe(item) for item in value] if isinstance(value, (list, tuple)) else value


def _scalars(values: dict[str, Value]) -> dict[str, float]:
    if values.get("kind") == "validation":
        return {f"validation/{values['source']}": values["loss"]}
    kind = values.get("kind", "train")
    if kind not in ("train", "event"):
        return {}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {f"{kind}/{name}": value for name, value in numbers.items()} | _expert_scalars(values.get("experts"))


def _expert_scalars(experts: dict[str, Any] | None) -> dict[str, float]:
    """`experts_load/3` for layer 3, and so on, and those of the worst layer among the other numbers."""
    if not experts:
        return {}
    of_layers = {name: values for name, values in experts.items() if isinstance(values, list)}
    first = experts.get("first_layer", 0)
    each = {f"experts_{name}/{first + at}": value for name, values in of_layers.items() for at, value in enumerate(values)}
    return {f"train/experts_{name}": value for name, value in worst(experts).items()} | each


def _cut_partial_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _run_id(folder: Path, service: str) -> str:
    """The service's id of this run folder, made at the first start and kept beside the metrics."""
    path = folder / f".{service}-id"
    if not path.exists():
        path.write_text(uuid4().hex[:16])
    return path.read_text().strip()


def _require(module: str, *, option: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{option} needs the package {module}, which is not usable here ({error}): pip install llmtrain[{extra}]"
        ) from error
