"""Prompts to texts: the decoder of `llmtrain.model.decode` with a tokenizer around it.

opened = open_model("runs/quickstart")
requests = [Request(opened.encode(text), Sampling(temperature=0), stop=("\\n\\n",)) for text in texts]
runner = runner_for(opened, requests, batch=8)
for done in complete(runner, opened.tokenizer, requests):
    print(done.text)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmtrain.data.text_stream import TextStream
from llmtrain.errors import UserError
from llmtrain.model.decode import CachedRunner, Decoder, Row, Runner
from llmtrain.model.host_cache import HostBlocks
from llmtrain.model.sampling import Sampling
from llmtrain.tools.open_model import OpenModel


@dataclass(frozen=True)
class Request:
    """One prompt and how it is continued."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""


class Completion:
    """A request on its way. `text` is what is certain so far, `tokens` all new tokens (the last may reach beyond a stop string)."""

    def __init__(self, request: Request, row: Row, tokenizer):
        self.request, self.row = request, row
        self._stream = TextStream(tokenizer, request.prompt, stop=request.stop)
        self._read = 0

    @property
    def text(self) -> str:
        """The new text given out so far."""
        return self._stream.text

    @property
    def tokens(self) -> list[int]:
        """The new tokens."""
        return self.row.new

    @property
    def logprobs(self) -> list[float]:
        """log-probability of each new token in nats, if the decoder keeps them."""
        return self.row.logprobs

    @property
    def finished(self) -> str | None:
        """Why it ended: `stop` or `length`; None while it runs."""
        return self.row.finished

    def advance(self) -> str:
        """Read the row's new tokens; the text that became certain."""
        new = self.row.new[self._read :]
        self._read += len(new)
        piece = self._stream.push(new) if new else ""
        if self._stream.stopped:
            self.row.finished = "stop"
        return piece + self._stream.finish() if self.row.finished else piece

    def flush(self) -> str:
        """Everything that `advance` has not given, although the row has not ended."""
        return self.advance() + self._stream.finish()


def capacity_for(requests: Sequence[Request]) -> int:
    """Tokens of the longest request, its new ones included."""
    return max((len(r.prompt) + r.sampling.max_new for r in requests), default=1)


def slots_for(requests: Sequence[Request], batch: int) -> int:
    """Sequences at a time."""
    return max(1, min(batch, len(requests)))


def runner_for(opened: OpenModel, requests: Sequence[Request], *, batch: int = 8, host: HostBlocks | None = None) -> CachedRunner:
    """A runner whose cache just holds the longest of `requests`, for up to `batch` at once, that of the blocks of `host` on the host.

    Raises UserError beyond model.max_seq_len.
    """
    longest = max(requests, key=lambda r: len(r.prompt) + r.sampling.max_new)
    if capacity_for(requests) > opened.cfg.max_seq_len:
        asked = f"a prompt of {len(longest.prompt)} tokens and --max-new {longest.sampling.max_new}"
        raise UserError(f"{asked} exceed model.max_seq_len {opened.cfg.max_seq_len}; lower --max-new or shorten the prompt")
    return CachedRunner(opened.model, slots=slots_for(requests, batch), capacity=capacity_for(requests), host=host)


class Texts:
    """Requests being completed. Iterating runs them and yields (index, new text) whenever one has new text or has ended.

    `items` holds their completions in order, complete or not.
    """

    def __init__(self, runner: Runner, tokenizer, requests: Sequence[Request], *, logprobs: bool = False):
        self._decoder = Decoder(runner, logprobs=logprobs)
        self.items = [Completion(r, self._decoder.add(r.prompt, r.sampling), tokenizer) for r in requests]
        self._index = {item.row: i for i, item in enumerate(self.items)}

    def __iter__(self) -> Iterator[tuple[int, str]]:
        yield from ((i, "") for i, item in enumerate(self.items) if item.finished)
        while rows := self._decoder.step():
            for row in rows:
                index = self._index[row]
                piece = self.items[index].advance()
                if piece or row.finished:
                    yield index, piece


def complete(runner: Runner, tokenizer, requests: Sequence[Request], *, logprobs: bool = False) -> list[Completion]:
    """Run all requests; their completions in the same order."""
    texts = Texts(runner, tokenizer, requests, logprobs=logprobs)
    for _ in texts:
        pass
    return texts.items
