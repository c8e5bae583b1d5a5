"""A source's conversations as tokens: made once, by whichever process comes first, and mapped by all."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from llmtrain.config.data import ConversationSource, TokenizerConfig
from llmtrain.data.cache import cached_arrays, content_key
from llmtrain.data.chat.records import Record, conversation_files, read_records
from llmtrain.data.chat.render import Rendered, Renderer
from llmtrain.data.chat.schemas import messages_of, recognise
from llmtrain.data.chat.template import find_template
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import BLOCK, InputFile
from llmtrain.data.readers import Problems
from llmtrain.data.tokenizer import Tokenizer, load

KEPT = 10
"""Messages about bad records that are kept."""
LOOKED_AT = 20
"""Records by which the schema is recognised."""


@dataclass(frozen=True)
class Conversations:
    """Conversations one after another in flat arrays, which may be memory maps."""

    tokens: np.ndarray
    """Ids, int32."""
    counts: np.ndarray
    """Whether a token is learnt when it is the target, bool; as long as `tokens`."""
    starts: np.ndarray
    """Where each begins, and the end of the last, int64."""
    where: np.ndarray
    """`FILE:LINE` of each, in UTF-8."""
    schema: str
    bad: int
    """Records that were skipped."""
    messages: tuple[str, ...]
    """What was wrong with the first of them."""

    def __len__(self) -> int:
        return len(self.where)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return np.diff(self.starts)


def open_tokenizer(tokenizer: TokenizerConfig | None) -> Tokenizer:
    """The run's tokenizer; DataError if it has none."""
    if tokenizer is None or tokenizer.path is None:
        raise DataError("conversations need a tokenizer; set tokenizer.path")
    return load(tokenizer.path, tokenizer.kind)


def open_conversations(source: ConversationSource, tokenizer: Tokenizer, *, cache: Path) -> Conversations:
    """The conversations of `source`, from the cache if its files, template, tokenizer and options are those that it was made of.

    Raises:
        DataError: no files, no template, no known schema, nothing that can be used, or a bad sample with `bad: fail`.
    """
    files = conversation_files(source.paths)
    renderer = Renderer(find_template(source.template, tokenizer), tokenizer)
    options = {"schema": source.schema, "system": source.system, "loss": source.loss, "bad": source.bad}
    made_of = {"template": renderer.template.fingerprint(), "tokenizer": tokenizer.fingerprint(), "files": [_content(f) for f in files]}
    key = content_key(format=1, names=[file.path for file in files], **options, **made_of)
    found = cached_arrays(cache / f"conversations-{key}", lambda: _build(source, files, renderer))
    schema, messages = str(found["schema"]), tuple(map(str, found["messages"]))
    return Conversations(*(found[n] for n in ("tokens", "counts", "starts", "where")), schema, int(found["bad"]), messages)


def _content(file: InputFile) -> str:
    digest = hashlib.sha256()
    with file.open() as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def with_schema(source: ConversationSource, files: Sequence[InputFile]) -> tuple[str, chain]:
    """The schema of the records, and all of them. Raises DataError if it is not given and none is known."""
    records = read_records(files)
    first = list(islice(records, LOOKED_AT))
    if source.schema != "auto":
        return source.schema, chain(first, records)
    try:
        return recognise([r.value for r in first if isinstance(r.value, dict)]), chain(first, records)
    except DataError as error:
        wrong = next((r for r in first if isinstance(r.value, DataError)), None)
        said = f"{wrong.where}: {wrong.value}" if wrong is not None else f"{files[0].path}: {error}; set the source's `schema`"
        raise DataError(said) from error


def render_record(record: Record, *, schema: str, system: str | None, renderer: Renderer) -> Rendered:
    """One record as tokens. Raises DataError, with its place, if it is bad."""
    try:
        if isinstance(record.value, DataError):
            raise record.value
        return renderer(messages_of(record.value, schema, system=system))
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from error


def _build(source: ConversationSource, files: Sequence[InputFile], renderer: Renderer) -> dict[str, np.ndarray]:
    schema, records = with_schema(source, files)
    problems = Problems(source.bad, mend="mend it, or set the source's `bad: skip`", kept=KEPT)
    tokens, counts, where = [], [], []
    for record in records:
        try:
            rendered = render_record(record, schema=schema, system=source.system, renderer=renderer)
        except DataError as error:
            problems.add(str(error))
            continue
        tokens.append(rendered.tokens)
        counts.append(rendered.answer if source.loss == "answers" else np.arange(len(rendered.tokens)) > 0)
        where.append(record.where.encode())
    if not tokens:
        first = f"; the first: {problems.messages[0]}" if problems.messages else ""
        raise DataError(f"{', '.join(source.paths)}: none of {problems.count} records can be used{first}")
    arrays = {"tokens": np.concatenate(tokens), "counts": np.concatenate(counts), "starts": np.cumsum([0, *map(len, tokens)])}
    said = {"schema": schema, "messages": problems.messages or np.empty(0, str), "bad": problems.count, "where": where}
    return arrays | {name: np.array(value) for name, value in said.items()}
