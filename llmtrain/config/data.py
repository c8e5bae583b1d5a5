"""What a run reads."""

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveInt, field_validator

from llmtrain.config import shortforms
from llmtrain.config.base import Section


class TokenizerConfig(Section):
    """The tokenizer that made the tokens; kept with the run and its exports."""

    path: str | None = None
    """A sentencepiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one; None trains on token ids alone."""
    kind: Literal["auto", "sentencepiece", "hf"] = "auto"
    """Library that reads it; `auto` decides by the file."""


class Source(Section):
    """What every kind of source has; a plugin's kind derives from it and adds its own options."""

    kind: str
    """Where the samples come from."""
    name: str | None = None
    """Name in messages and in a phase's mix; the file's stem (the kind of a plugin's source) if not given."""
    weight: NonNegativeFloat = 1.0
    """Share of the samples of the mix, relative to the other sources."""

    @property
    def label(self) -> str:
        """The source's name."""
        return self.name or self.kind


class DataSource(Source):
    """One tokenised corpus: a memory-mapped `PATH.bin` with its index `PATH.idx`."""

    kind: Literal["tokens"] = "tokens"
    """Tokenised text; plugins may add other kinds."""
    path: str
    """Prefix of the `.bin` / `.idx` pair that `llmtrain data tokenize` wrote (Megatron-LM's format)."""

    @property
    def label(self) -> str:
        """The source's name, the last part of its path where none is given."""
        return self.name or Path(self.path).name


class DataConfig(Section):
    """Token sources, how they are blended and packed."""

    train: list[DataSource] = []
    """Sources trained on, blended by weight."""
    validation: list[DataSource] = []
    """Sources of the validation loss, each reported under its name."""
    document_mask: bool = True
    """Tokens attend within their own document only, and the token after a document's end is no target."""
    shuffle: bool = True
    """Shuffle documents and samples, anew each epoch, from the run's seed."""
    cache: str | None = None
    """Folder for the sample index; `.cache` beside the first source if not given."""
    prefetch: PositiveInt = 4
    """Micro-batches that a background thread reads ahead."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _bare_paths(cls, value: Any) -> Any:
        value = shortforms.sources(value)
        if not isinstance(value, list):
            return value
        return [{"kind": "tokens", **item} if isinstance(item, dict) else item for item in value]
