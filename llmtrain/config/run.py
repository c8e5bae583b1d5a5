"""The whole configuration of one run."""

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, field_validator, model_validator

from llmtrain.config import shortforms
from llmtrain.config import train as t
from llmtrain.config.base import Section
from llmtrain.config.data import DataConfig, TokenizerConfig
from llmtrain.config.gap import GapConfig
from llmtrain.config.lora import LoraConfig, check_lora
from llmtrain.config.metaladder import MetaLadderConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.pretrained import expand_run
from llmtrain.config.sparing import check_memory


class RunConfig(Section):
    """Everything that defines a run; written to its folder as config.yaml."""

    name: str = "run"
    """The run's folder is output/name."""
    output: str = "runs"
    """Where run folders live."""
    seed: NonNegativeInt = 1234
    """Initial weights, shuffling and sampling follow from it."""
    plugins: list[str] = []
    """Modules imported first that add model families, ops, data sources, stages or options (docs/plugins.md)."""
    device: str = "auto"
    """`auto` takes npu or cuda when one is usable, else cpu; or name one."""
    model: ModelConfig = ModelConfig()
    """The model's shape."""
    lora: LoraConfig = LoraConfig()
    """Adapters beside frozen weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    data: DataConfig = DataConfig()
    """Token sources."""
    optim: t.OptimConfig = t.OptimConfig()
    """The optimizer."""
    schedule: t.ScheduleConfig = t.ScheduleConfig()
    """The learning rate over the run."""
    train: t.TrainConfig = t.TrainConfig()
    """Length, batch, memory."""
    parallel: t.ParallelConfig = t.ParallelConfig()
    """The mesh."""
    engine: t.EngineConfig = t.NativeEngineConfig()
    """What runs the step; `engine: NAME` is short for `engine: {kind: NAME}`."""
    kernels: dict[str, str] = {}
    """Implementation per op (`llmtrain kernels` lists them); ops not named are `auto`."""
    precision: t.PrecisionConfig = t.PrecisionConfig()
    """Number formats."""
    checkpoint: t.CheckpointConfig = t.CheckpointConfig()
    """Saving and resuming."""
    metrics: t.MetricsConfig = t.MetricsConfig()
    """What is recorded."""
    guards: t.GuardsConfig = t.GuardsConfig()
    """What stops a bad step."""
    gap: GapConfig = GapConfig()
    """Gradient Ascent Post-training, `llmtrain gap` (docs/gap.md)."""
    metaladder: MetaLadderConfig = MetaLadderConfig()
    """Of the stage `metaladder`."""

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_pretrained(cls, values: Any) -> Any:
        return expand_run(values)

    @classmethod
    def load(cls, source: "str | Path | dict[str, Any] | None" = None, overrides: "dict[str, Any] | list[str]" = ()) -> "RunConfig":
        """The validated configuration of a YAML file (with its `extends`) or nested dict, with overrides over it.

        source: None starts from the defaults. overrides: `{"train.steps": 200}`, or words of the command line, `["--train.steps", "200"]`.
        `plugins` are loaded, and what they add is checked too. Raises ConfigError with a message per thing wrong.
        """
        from llmtrain.config.load import load
        from llmtrain.config.yamlfile import inline

        pairs = overrides.items() if isinstance(overrides, dict) else ()
        return load(source, [f"--{name}={inline(value)}" for name, value in pairs] or list(overrides)).run

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_name(cls, value: Any) -> Any:
        return shortforms.engine(value)

    @model_validator(mode="after")
    def _sequences_fit(self) -> "RunConfig":
        longest = max([p.seq_len or self.train.seq_len for p in self.train.phases], default=self.train.seq_len)
        if self.model.position.kind == "learned" and longest > self.model.max_seq_len:
            raise ValueError(
                f"sequences of {longest} tokens exceed model.max_seq_len {self.model.max_seq_len}, the number of learned positions"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_spared_once(self) -> "RunConfig":
        check_memory(self)
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> "RunConfig":
        check_lora(self)
        return self
