"""The package from Python: run a configuration, and look at what came of it."""

import os
import tempfile
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import UserError

if TYPE_CHECKING:
    from llmtrain.config.run import RunConfig
    from llmtrain.tools.open_model import OpenModel


class RunResult(int):
    """The exit code of a run, an integer (0 done, 1 failed, 2 stopped after saving, 3 stopped by a guard), that knows the run's folder."""

    folder: Path

    def __new__(cls, code: int, folder: str | Path) -> "RunResult":
        """The result of the run in `folder`."""
        result = super().__new__(cls, code)
        result.folder = Path(folder)
        return result

    def __repr__(self) -> str:
        return f"RunResult({int(self)}, {str(self.folder)!r})"

    @property
    def done(self) -> bool:
        """Whether the run went to its end."""
        return self == 0

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per step: step, loss, grad_norm, lr, tokens, tokens_per_second, memory_gb, ... (docs/run-folder.md)."""
        return self._history.train

    @cached_property
    def losses(self) -> list[float]:
        """Training loss of every recorded step, in nats per target token."""
        return [line["loss"] for line in self.metrics]

    @cached_property
    def validation(self) -> dict[str, float]:
        """The last validation loss of every source."""
        return {line["source"]: line["loss"] for line in self._history.validation}

    @property
    def export(self) -> Path | None:
        """The Hugging Face folder, if checkpoint.export made one."""
        return self.folder / "hf" if (self.folder / "hf").exists() else None

    @cached_property
    def _history(self):
        from llmtrain.tools.history import History

        return History.read(self.folder)


def run(cfg: "RunConfig", *, stage: str = "train") -> RunResult:
    """Do what `cfg` says, as `llmtrain STAGE` would, and return the exit code with what the run left.

    A mesh of one rank runs in this process; more ranks are started as processes of this machine, whose rank 0 writes to this process's
    stdout. Under torchrun or srun this process is a rank. What can be known to be wrong is raised before anything starts.

    stage: `train`, `sft`, `gap`, `metaladder`, or a stage that a plugin registered.

    Raises:
        UserError: a wrong configuration, missing data, an unknown stage; ranks asked for outside of the main thread.
    """
    from llmtrain.stages import registry
    from llmtrain.tools.launch import is_launched

    if stage not in registry.stages():
        raise UserError(f"stage {stage!r} is not known; allowed: {', '.join(registry.stages())} (a plugin may add one)")
    chosen, folder = registry.stage(stage), Path(cfg.output) / cfg.name
    cfg = chosen.settle(cfg)
    if is_launched():
        return RunResult(chosen.run(cfg), folder)
    ranks = registry.prepare(chosen, cfg)
    return RunResult(chosen.run(cfg) if ranks == 1 else _start(cfg, stage, ranks), folder)


def _start(cfg: "RunConfig", stage: str, ranks: int) -> int:
    from llmtrain.config.load import to_yaml
    from llmtrain.stages.registry import start

    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"{ranks} ranks can be started from the main thread only; call run there, or set the mesh to one rank (parallel.*)")
    descriptor, name = tempfile.mkstemp(suffix=".yaml", prefix="llmtrain-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(to_yaml(cfg))
        return start(cfg, [stage, "-c", name], ranks)
    finally:
        os.unlink(name)


def generate(model: "str | Path | OpenModel", prompts: "str | Sequence[str]", **options: Any) -> "str | list[str]":
    """Continue texts with a model.

    model: a run folder, a Hugging Face folder, or what `open_model` made of one (read once, used often). prompts: a text, or several that
    are run together; the answer has the same form, without the prompts. options: `max_new`, `temperature`, `top_p`, `seed`, ... of
    `llmtrain.model.sampling.Sampling`, and `stop`, strings that end a text.

    Raises:
        UserError: no such model, no tokenizer, or more tokens than model.max_seq_len.
    """
    from llmtrain.model.sampling import Sampling
    from llmtrain.tools.completions import Request, complete, runner_for
    from llmtrain.tools.open_model import OpenModel, open_model

    opened = model if isinstance(model, OpenModel) else open_model(model)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop, sampling = tuple(options.pop("stop", ())), Sampling(stop_ids=opened.stop_ids, **options)
    requests = [Request(opened.encode(text), sampling, stop) for text in texts]
    if not requests:
        return []
    answers = [item.text for item in complete(runner_for(opened, requests), opened.need_tokenizer(), requests)]
    return answers[0] if isinstance(prompts, str) else answers
