"""The texts of `llmtrain gap`, and one of them as the data of a run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmtrain.config.gap import GapTexts
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.data.inputs import ReadOptions, expand, plan_units
from llmtrain.data.readers import Problems, documents
from llmtrain.data.token_file import TokenFile, bin_path
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.errors import UserError


@dataclass(frozen=True)
class Text:
    """One text: its source's name, its place among the source's texts, and its last tokens."""

    source: str
    index: int
    tokens: tuple[int, ...] = field(repr=False)

    @property
    def key(self) -> str:
        """Tells texts apart, and whether a text is still the same."""
        digest = hashlib.sha256(np.array(self.tokens, dtype=np.int64).tobytes()).hexdigest()[:12]
        return f"{self.source}-{self.index}-{digest}"


def read_texts(sources: Sequence[str], options: ReadOptions) -> list[str]:
    """The documents of files, folders, globs and aliases, in order. Raises DataError for what cannot be read."""
    problems = Problems(options.bad)
    return [text for unit in plan_units(expand(sources, options)) for text in documents(unit, options, problems)]


def gather_texts(cfg: RunConfig, tokenizer: Tokenizer | None) -> list[Text]:
    """All texts of gap.texts, cut to their last train.seq_len tokens; the same on every rank. Raises UserError if a source has none."""
    if not cfg.gap.texts:
        raise UserError("gap.texts: names no text to ascend on")
    return [text for source in cfg.gap.texts for text in _of_source(source, tokenizer, length=cfg.train.seq_len, seed=cfg.seed)]


def _of_source(source: GapTexts, tokenizer: Tokenizer | None, *, length: int, seed: int) -> list[Text]:
    rows = _rows(source, tokenizer)
    long_enough = [index for index, row in enumerate(rows) if len(row) >= source.min_tokens]
    wanted = source.count or len(long_enough)
    if not long_enough or wanted > len(long_enough):
        found = f"{len(long_enough)} of {len(rows)} texts have at least {source.min_tokens} tokens"
        raise UserError(f"gap.texts {source.name!r}: {found}, {wanted or 'some'} are wanted (count, min_tokens)")
    if source.count is not None:
        long_enough = np.random.default_rng(seed).permutation(long_enough)[:wanted].tolist()
    return [Text(source.name, index, tuple(map(int, rows[index][-length:]))) for index in long_enough]


def _rows(source: GapTexts, tokenizer: Tokenizer | None) -> list:
    rows, files = [], []
    for item in source.input:
        if bin_path(item).is_file():
            pair = TokenFile(item)
            rows += [pair.document(index) for index in range(len(pair))]
        else:
            files.append(item)
    if files:
        if tokenizer is None:
            raise UserError(f"gap.texts {source.name!r}: text needs tokenizer.path (a model.pretrained folder brings its own)")
        options = ReadOptions(format=source.format, field=source.field, split=source.split)
        rows += tokenizer.encode_batch(read_texts(files, options))
    return rows


class OneText:
    """The same text in every step, as a dataset of the loop.

    The first sample of every `batch` is the text; the others have no target. So a text can go through several data-parallel
    ranks, and the loss is still the text's alone.
    """

    def __init__(self, tokens: Sequence[int], *, seq_len: int, batch: int):
        self.seq_len, self._batch = seq_len, batch
        ids = torch.zeros(seq_len, dtype=torch.int64)
        ids[: len(tokens)] = torch.tensor(tokens)
        targets = torch.full((seq_len,), NO_TARGET)
        targets[: len(tokens) - 1] = ids[1 : len(tokens)]
        rest = seq_len - len(tokens)
        self._documents = (len(tokens), rest) if rest else (seq_len,)
        self._positions = torch.cat([torch.arange(n) for n in self._documents])
        self._ids, self._targets = ids, targets

    def __len__(self) -> int:
        return 1 << 30

    def batch(self, first: int, count: int) -> Batch:
        """Samples first to first + count."""
        samples = range(first, first + count)
        nothing = torch.full((self.seq_len,), NO_TARGET)
        return Batch(
            tokens=self._ids.repeat(count, 1),
            targets=torch.stack([nothing if sample % self._batch else self._targets for sample in samples]),
            positions=self._positions.repeat(count, 1),
            documents=(self._documents,) * count,
            samples=tuple(samples),
        )
