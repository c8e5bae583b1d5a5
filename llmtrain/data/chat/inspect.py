"""A conversation file as a run would read it, for people."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.config.data import ConversationSource, TokenizerConfig
from llmtrain.data.chat.records import conversation_files
from llmtrain.data.chat.render import Rendered, Renderer
from llmtrain.data.chat.source import ConversationSamples
from llmtrain.data.chat.template import find_template
from llmtrain.data.chat.tokens import Conversations, open_conversations, open_tokenizer, render_record, with_schema
from llmtrain.data.errors import DataError
from llmtrain.data.inspect import histogram

LEARNT, OTHER = "bold green", "dim"
MARKS = "«", "»"
"""Around what is learnt, so that it can be told without colour."""
SHOWN = 2000
"""Characters of a text shown."""


def inspect(source: ConversationSource, tokenizer: TokenizerConfig, *, samples: int, seq_len: int | None, seed: int) -> Iterator[Any]:
    """Lines (text of rich, or plain) on what `source` holds: schema, bad records, lengths, share of tokens that count, rows, samples.

    Raises:
        DataError: nothing in it can be used.
    """
    source = source.model_copy(update={"bad": "skip"})
    with tempfile.TemporaryDirectory() as cache:
        model = open_tokenizer(tokenizer)
        found = open_conversations(source, model, cache=Path(cache))
        yield from _overview(source, found, find_template(source.template, model).name)
        if seq_len is not None:
            yield from _packed(source, tokenizer, seq_len=seq_len, seed=seed, cache=Path(cache))
        for number, (where, rendered) in enumerate(_rendered(source, found.schema, Renderer(find_template(source.template, model), model))):
            if number == samples:
                break
            counts = len(rendered.tokens) - 1 if source.loss == "all" else int(rendered.answer.sum())
            yield f"--- {where}: {len(rendered.tokens):,} tokens, {counts:,} count"
            yield painted(rendered, everything=source.loss == "all")


def _overview(source: ConversationSource, found: Conversations, template: str) -> Iterator[str]:
    yield f"{', '.join(source.paths)}: {len(found):,} conversations, schema {found.schema}, template {template}"
    if found.bad:
        yield f"bad: {found.bad:,} records, which a run refuses unless the source has `bad: skip`; the first:"
        yield from (f"  {message}" for message in found.messages)
    yield from histogram(found.lengths, of="conversation")
    count, total = int(found.counts.sum()), len(found.tokens)
    yield f"{count:,} of {total:,} tokens count ({count / total:.1%}); they are between {' and '.join(MARKS)} below"


def _packed(source: ConversationSource, tokenizer: TokenizerConfig, *, seq_len: int, seed: int, cache: Path) -> Iterator[str]:
    options = {"seq_len": seq_len, "seed": seed, "shuffle": True, "cache": cache, "tokenizer": tokenizer}
    for together in (True, False):
        rows = ConversationSamples(source.model_copy(update={"pack": together}), **options)
        filled = rows.tokens / (rows.samples_per_epoch * (seq_len + 1))
        how = "packed to" if together else "one a row of"
        yield f"{how} {seq_len}: {rows.samples_per_epoch:,} rows an epoch, {filled:.1%} filled, {rows.too_long:,} conversations too long"


def _rendered(source: ConversationSource, schema: str, renderer: Renderer) -> Iterator[tuple[str, Rendered]]:
    _, records = with_schema(source, conversation_files(source.paths))
    for record in records:
        try:
            yield record.where, render_record(record, schema=schema, system=source.system, renderer=renderer)
        except DataError:  # counted already
            continue


def painted(rendered: Rendered, *, everything: bool = False) -> Any:
    """The text with what is learnt in colour and between marks: a `rich.text.Text`."""
    from rich.text import Text

    out, at = Text(), 0
    for start, end in ((0, len(rendered.text)),) if everything else rendered.spans:
        out.append(rendered.text[at:start], OTHER)
        out.append(f"{MARKS[0]}{rendered.text[start:end]}{MARKS[1]}", LEARNT)
        at = end
    out.append(rendered.text[at:], OTHER)
    if len(out) > SHOWN:
        out.truncate(SHOWN, overflow="ellipsis")
    return out
