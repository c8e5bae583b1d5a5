"""What a run reads."""

import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from llmtrain.config import shortforms
from llmtrain.config.base import Section

warnings.filterwarnings("ignore", 'Field name "schema"')  # of a method of pydantic's first version, which nothing here calls


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


class ConversationSource(Source):
    """Conversations, or prompts with their answers, of which the answers are learnt."""

    kind: Literal["conversations"] = "conversations"
    """Records of .jsonl, .json or .parquet files, rendered by a chat template and packed whole."""
    path: str | list[str]
    """Files, globs, folders or URLs."""
    schema: Literal["auto", "messages", "sharegpt", "alpaca", "question_answer", "prompt_response"] = "auto"
    """Which fields a record has (docs/sft.md); `auto` recognises it by the first records."""
    template: str = "auto"
    """The chat template: `auto`, that of the tokenizer's folder; `chatml`, `llama3`; `plain`, prompt and response as they are; or a jinja
    file."""
    system: str | None = None
    """System message of conversations that have none."""
    loss: Literal["answers", "all"] = "answers"
    """Which tokens are targets: those of answers, with the token that ends their turn, or all."""
    bad: Literal["fail", "skip"] = "fail"
    """Stop at a sample that cannot be used (wrong fields, an empty answer) and name its line, or skip and count it."""
    too_long: Literal["skip", "truncate", "fail"] = "skip"
    """What happens to a conversation that does not fit into a row."""
    pack: bool = True
    """Several whole conversations in a row, by best fit; else one a row."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def label(self) -> str:
        """The source's name, the stem of its first file where none is given."""
        return self.name or Path(self.paths[0]).name.partition(".")[0]


FileSource = Annotated[DataSource | ConversationSource, Field(discriminator="kind")]
RECORDS = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.(gz|bz2|xz|zst))?$")
"""Suffixes by which a bare path is known to hold conversations."""


class DataConfig(Section):
    """Token sources, how they are blended and packed."""

    train: list[FileSource] = []
    """Sources trained on, blended by weight."""
    validation: list[FileSource] = []
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
        return [{"kind": _kind(item.get("path")), **item} if isinstance(item, dict) else item for item in value]

    @model_validator(mode="after")
    def _apart(self) -> "DataConfig":
        packed = [s.label for s in (*self.train, *self.validation) if isinstance(s, ConversationSource) and s.pack]
        if packed and not self.document_mask:
            raise ValueError(f"document_mask: false would let the packed conversations of {packed[0]} see each other; set its pack: false")
        return self


def _kind(path: Any) -> str:
    first = path[0] if isinstance(path, list) and path else path
    return "conversations" if RECORDS.search(str(first)) else "tokens"
