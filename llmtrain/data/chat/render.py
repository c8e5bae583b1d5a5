"""One conversation as tokens, and which of them are learnt.

A model answers after the tokens of the text before its answer. Where a tokenizer would join that text's end with the answer's beginning,
the two are therefore tokenised apart: training then sees what generation will.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.data.chat.sandbox import CLOSE, OPEN
from llmtrain.data.chat.template import ChatTemplate, Message
from llmtrain.data.errors import DataError
from llmtrain.data.tokenizer import Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as a model sees it."""

    text: str
    spans: tuple[Span, ...]
    """Where in the text the answers are, each with the token that ends its turn."""
    tokens: np.ndarray
    """[N] ids, int32."""
    answer: np.ndarray
    """[N] whether a token belongs to an answer, bool."""


class Renderer:
    """Conversations into tokens, by a template and a tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer

    def __call__(self, messages: Sequence[Message]) -> Rendered:
        """Raises DataError if the template refuses, hides where answers are, or a message holds a special token's name."""
        for number, message in enumerate(messages):
            held = next((name for name in (*self.tokenizer.special, OPEN, CLOSE) if name and name in message["content"]), None)
            if held is not None:
                raise DataError(f"message {number} holds {held!r}, which is a special token")
        text, spans = self._marked(messages) if self.template.marks_answers else self._found(messages)
        tokens, answer = self._tokenise(text, spans)
        if not answer.any():
            raise DataError("the template renders no answer")
        return Rendered(text, tuple(spans), tokens, answer)

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """By the template's own `{% generation %}`."""
        return take_out_marks(self.template.render_marked(messages))

    def _found(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """By what the conversation up to an answer, without it and with it, is rendered as."""
        whole = self.template.render(messages)
        spans = []
        for end, message in enumerate(messages, 1):
            if message["role"] == "assistant":
                before = self.template.render(messages[: end - 1], answer_follows=True)
                after = whole if end == len(messages) else self.template.render(messages[:end])
                if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                    return self._surrounded(messages, whole)
                spans.append((len(before), self._turn_end(whole, len(before), len(after))))
        return whole, spans

    def _surrounded(self, messages: Sequence[Message], whole: str) -> tuple[str, list[Span]]:
        """By marks around the contents, for templates that render a turn otherwise once another one follows."""
        marked = [m | {"content": f"{OPEN}{m['content'].strip()}{CLOSE}"} if m["role"] == "assistant" else m for m in messages]
        text, spans = take_out_marks(self.template.render_marked(marked))
        if text != whole or len(spans) != sum(m["role"] == "assistant" for m in messages):
            raise DataError("the template changes answers, so that they cannot be told from the rest; mark them in it by {% generation %}")
        return whole, [(start, self._after_special(whole, end)) for start, end in spans]

    def _turn_end(self, text: str, start: int, end: int) -> int:
        """The end of the last special token in text[start:end]: what a template writes behind it, the model need not. Else `end`."""
        ends = [found + len(name) for name in self.tokenizer.special if (found := text.rfind(name, start, end)) >= 0]
        return max(ends, default=end)

    def _after_special(self, text: str, end: int) -> int:
        """Behind the special token that follows `end`, if one does."""
        rest = text[end:]
        begin = end + len(rest) - len(rest.lstrip())
        return next((begin + len(name) for name in self.tokenizer.special if text.startswith(name, begin)), end)

    def _tokenise(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text` with a border between tokens at both ends of every span, and which of them are in one."""
        encode = self.tokenizer.encode_marked
        done: list[int] = []  # tokens of text[:anchor]
        anchor, ahead, borders = 0, encode(text), []
        for cut in (place for span in spans for place in span):
            part = encode(text[anchor:cut])
            borders.append(len(done) + len(part))
            if ahead[: len(part)] != part:  # a token would reach over the cut
                done, anchor = [*done, *part], cut
                ahead = encode(text[anchor:])
        tokens = np.array([*done, *ahead], np.int32)
        answer = np.zeros(len(tokens), bool)
        for start, end in zip(borders[::2], borders[1::2]):
            answer[start:end] = True
        return tokens, answer


def take_out_marks(text: str) -> tuple[str, list[Span]]:
    """`text` without OPEN and CLOSE, and the spans that they stood around.

    Raises:
        DataError: they are not in pairs, one after another.
    """
    parts, spans, size = [], [], 0
    for number, part in enumerate(text.split(OPEN)):
        inside, *after = part.split(CLOSE)
        if len(after) != (1 if number else 0):
            raise DataError("the template has {% generation %} inside {% generation %}")
        if number:
            spans.append((size, size + len(inside)))
        parts += [inside, *after]
        size += sum(map(len, (inside, *after)))
    return "".join(parts), spans
