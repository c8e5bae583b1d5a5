"""Text of tokens that come one by one, never a broken character, and cut at stop strings."""

from collections.abc import Sequence

BROKEN = "\ufffd"
"""What decoders write for bytes that are no UTF-8, such as the first bytes of a character whose others are still to come."""
CHARACTER = 3
"""Bytes of a UTF-8 character that may still be incomplete."""
CONTEXT = 6
"""Tokens decoded again in front of new ones, because what a token reads as depends on its neighbours."""


class TextStream:
    """Turns tokens into pieces of text that, joined, are the text of all of them up to the first stop string.

    A piece is held back while it ends inside a character or in what may become a stop string.

    Args:
        tokenizer: anything with `decode(ids) -> str`.
        prompt: the tokens before; they are not part of the text.
        stop: strings that end the text; they are not part of it, and may begin and end inside tokens.
    """

    def __init__(self, tokenizer, prompt: Sequence[int] = (), *, stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string is empty; it would stop at once")
        self._decode, self._stop = tokenizer.decode, tuple(stop)
        self._tokens = list(prompt[-CONTEXT:])
        self._text = ""
        self._given = 0
        self._settled = len(self._decode(self._tokens))  # characters of the window that are in _text, or in the prompt
        self.stopped = False
        """Whether a stop string was met; later tokens are ignored."""

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return self._text[: self._given]

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain with these tokens and was not before; often empty."""
        if self.stopped:
            return ""
        self._tokens += tokens
        window = self._decode(self._tokens)
        whole = _whole(window)
        self._take(whole)
        if whole == window:  # a clean end: what comes next needs only a few tokens of context
            self._tokens = self._tokens[-CONTEXT:]
            self._settled = len(self._decode(self._tokens))
        return self._give(len(self._text) - self._held())

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        self._take(self._decode(self._tokens))
        return self._give(len(self._text))

    def _take(self, window: str) -> None:
        """Append what is new of the decoded window, and look for stop strings where one may have been completed."""
        before, self._text = len(self._text), self._text + window[self._settled :]
        self._settled = max(self._settled, len(window))
        reach = max(map(len, self._stop), default=1) - 1
        found = [at for stop in self._stop if (at := self._text.find(stop, max(0, before - reach))) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _held(self) -> int:
        """Characters at the end that a stop string may begin with."""
        if self.stopped:
            return 0
        return max((n for stop in self._stop for n in range(len(stop)) if self._text.endswith(stop[:n])), default=0)

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


def _whole(text: str) -> str:
    """Without the last characters if they may be the beginning of one."""
    if not text.endswith(BROKEN):
        return text
    kept = len(text)
    while len(text) - kept < CHARACTER and text[:kept].endswith(BROKEN):
        kept -= 1
    return text[:kept]
