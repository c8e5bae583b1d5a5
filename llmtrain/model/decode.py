"""Generation, token by token: many sequences at once, each with its own length, rule and random numbers.

    decoder = Decoder(CachedRunner(model, slots=8, capacity=2048))
    rows = [decoder.add(prompt, Sampling(temperature=0)) for prompt in prompts]
    while decoder.step():
        ...

A sequence stands in a slot of the cache. Slots have lengths of their own, so no prompt is padded for the others' sake: a sequence that ends
leaves at once, one that waits takes its slot, and tokens may be put in amid generation (`insert`).
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.cache import SlotCache
from llmtrain.model.host_cache import HostBlocks
from llmtrain.model.sampling import Sampler, Sampling, draw, log_probabilities
from llmtrain.ops import Mask

FILL_TOKENS = 4096
"""Tokens of prompts that are run through the model at once, padding included."""


class Runner(Protocol):
    """Runs a model over the sequences in its slots."""

    slots: int
    capacity: int

    def fill(self, rows: Sequence[list[int]], first: int, start: int) -> None:
        """Take in rows[i][start:-1] for slot first + i; the slots hold rows[i][:start] already."""

    def begin(self, rows: Sequence[list[int]]) -> Tensor | None:
        """Take in rows[i], all new and equally long, for slot i and return the logits [B,V] after them, or None: then `fill` and `step`."""

    def step(self, rows: Sequence[list[int]]) -> Tensor:
        """Logits [B,V] after rows[i], which is in slot i but for its last token."""

    def move(self, source: int, target: int) -> None:
        """The sequence of slot `source` is in `target` from now on."""


class CachedRunner:
    """A model on one rank with a cache of `slots` x `capacity` tokens (`cache_bytes` says how large); the blocks of `host` have theirs on
    the host."""

    def __init__(self, model, *, slots: int, capacity: int, host: HostBlocks | None = None):
        self.model, self.slots, self.capacity = model, slots, capacity
        self.cache = SlotCache(slots, capacity, host=host)
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def fill(self, rows: Sequence[list[int]], first: int, start: int) -> None:
        ends = [len(row) - 1 for row in rows]
        longest = max(ends) - start
        # Padding on the right is behind every real token, so causal attention never sees it; what it leaves in the cache is overwritten.
        tokens = torch.tensor([row[start:-1] + [0] * (longest - end + start) for row, end in zip(rows, ends)], device=self._device)
        self.cache.lengths[first : first + len(rows)] = [start] * len(rows)
        positions = torch.arange(start, start + longest, device=self._device)[None]
        self.model(tokens, positions=positions, mask=Mask(), cache=self.cache.fill(first, len(rows)), last=0)
        self.cache.lengths[first : first + len(rows)] = ends

    @torch.inference_mode()
    def begin(self, rows: Sequence[list[int]]) -> Tensor | None:
        self.cache.lengths[: len(rows)] = [0] * len(rows)
        tokens = torch.tensor(rows, device=self._device)
        positions = torch.arange(tokens.shape[1], device=self._device)[None]
        logits = self.model(tokens, positions=positions, mask=Mask(), cache=self.cache.fill(0, len(rows)), last=1)["logits"][:, 0]
        self.cache.lengths[: len(rows)] = map(len, rows)
        return logits

    @torch.inference_mode()
    def step(self, rows: Sequence[list[int]]) -> Tensor:
        count = len(rows)
        self.cache.lengths[:count] = [len(row) - 1 for row in rows]
        tokens = torch.tensor([row[-1:] for row in rows], device=self._device)
        positions = torch.tensor([[len(row) - 1] for row in rows], device=self._device)
        logits = self.model(tokens, positions=positions, mask=Mask(), cache=self.cache.step(count), last=1)["logits"][:, 0]
        self.cache.lengths[:count] = map(len, rows)
        return logits

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)


class UncachedRunner:
    """Any function from tokens [B,S] to logits [B,S,V], such as an engine's `logits` under a mesh; every step runs the whole sequences.

    A `window` leaves out all but the last tokens of longer ones. All ranks call it with the same sequences and draw the same tokens.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], *, slots: int, capacity: int, window: int | None = None):
        self.logits, self.slots, self.capacity, self.window = logits, slots, capacity, window or capacity

    def fill(self, rows: Sequence[list[int]], first: int, start: int) -> None:
        pass

    def begin(self, rows: Sequence[list[int]]) -> None:
        return None

    def step(self, rows: Sequence[list[int]]) -> Tensor:
        seen = [row[-self.window :] for row in rows]
        longest = max(map(len, seen))
        logits = self.logits(torch.tensor([row + [0] * (longest - len(row)) for row in seen]))
        return logits[range(len(seen)), [len(row) - 1 for row in seen]]

    def move(self, source: int, target: int) -> None:
        pass


@dataclass(eq=False)
class Row:
    """One sequence. `tokens` begins with the prompt; `logprobs` has an entry per token after it (NaN for inserted ones)."""

    tokens: list[int]
    prompt: int
    """Tokens of the prompt."""
    sampling: Sampling
    logprobs: list[float] = field(default_factory=list)
    """log-probability of each new token under the model (temperature 1, nothing cut), in nats."""
    finished: str | None = None
    """Why it ended: `stop` (a stop id), `length` (max_new or the cache), or what `end` was given."""
    sampler: Sampler = field(init=False, repr=False)
    fed: int = 0
    """Tokens that the runner has taken in."""

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling)

    @property
    def new(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt :]


class Decoder:
    """Sequences in the slots of a runner, and those that wait for one."""

    def __init__(self, runner: Runner, *, logprobs: bool = False):
        self.runner, self._logprobs = runner, logprobs
        self.live: list[Row] = []
        """Row i is in slot i."""
        self.waiting: deque[Row] = deque()

    def add(self, tokens: Sequence[int], sampling: Sampling) -> Row:
        """Queue a prompt. Raises UserError if it is empty or does not fit the cache with its max_new."""
        if not len(tokens):
            raise UserError("the prompt is empty; give at least one token")
        if len(tokens) + sampling.max_new > self.runner.capacity:
            asked = f"a prompt of {len(tokens)} tokens and max_new {sampling.max_new}"
            raise UserError(f"{asked} exceed the cache's {self.runner.capacity} tokens; lower max_new or raise the capacity")
        row = Row([int(t) for t in tokens], len(tokens), sampling)
        if sampling.max_new == 0:
            row.finished = "length"
        else:
            self.waiting.append(row)
        return row

    def insert(self, row: Row, tokens: Collection[int]) -> None:
        """Append given tokens to a sequence amid generation; they count towards its max_new."""
        if row.finished:
            raise ValueError(f"the sequence has ended ({row.finished}); nothing can be inserted")
        row.tokens += map(int, tokens)
        row.logprobs += [float("nan")] * len(tokens)
        if len(row.new) >= row.sampling.max_new or len(row.tokens) > self.runner.capacity:
            self.end(row, "length")

    def end(self, row: Row, reason: str) -> None:
        """Take a sequence out, waiting or live; its slot is free for the next step."""
        row.finished = row.finished or reason
        if row in self.waiting:
            self.waiting.remove(row)

    def step(self) -> list[Row]:
        """Add a token to every live sequence, after letting waiting ones in; returns those sequences, [] when none is left.

        A sequence that met a stop id has ended without a token.
        """
        self._leave()
        while self.waiting and len(self.live) < self.runner.slots:
            self.live.append(self.waiting.popleft())
        if not self.live:
            return []
        logits = self._logits([row.tokens for row in self.live])
        tokens = draw(logits, [row.sampler for row in self.live])
        chances = log_probabilities(logits, tokens) if self._logprobs else [None] * len(tokens)
        for row, token, chance in zip(self.live, tokens, chances):
            row.fed = len(row.tokens)
            self._append(row, token, chance)
        return list(self.live)

    def run(self) -> None:
        """Step until nothing is left."""
        while self.step():
            pass

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Logits [B,V] after every live sequence. Of new ones, all equally long, one pass gives them."""
        if all(not row.fed and len(row.tokens) == len(rows[0]) for row in self.live) and len(rows) * len(rows[0]) <= FILL_TOKENS:
            logits = self.runner.begin(rows)
            if logits is not None:
                return logits
        self._catch_up()
        return self.runner.step(rows)

    def _append(self, row: Row, token: int, chance: float | None) -> None:
        if token in row.sampling.stop_ids:
            row.finished = "stop"
            return
        row.tokens.append(token)
        if chance is not None:
            row.logprobs.append(chance)
        if len(row.new) >= row.sampling.max_new:
            row.finished = "length"

    def _leave(self) -> None:
        """Free the slots of ended sequences; the last live one moves into the gap."""
        for slot in reversed(range(len(self.live))):
            if self.live[slot].finished:
                last = self.live.pop()
                if slot < len(self.live):
                    self.live[slot] = last
                    self.runner.move(len(self.live), slot)

    def _catch_up(self) -> None:
        """Let the runner take in all but the last token of prompts and of inserted text, new neighbours together."""
        slot = 0
        while slot < len(self.live):
            group = self._group(slot)
            rows = [row.tokens for row in group]
            if max(map(len, rows)) - group[0].fed > 1:
                self.runner.fill(rows, slot, group[0].fed)
            slot += len(group)

    def _group(self, slot: int) -> list[Row]:
        """The row of `slot` and, if it is new, those that follow it (new ones stand last), as long as padding does not double the work."""
        group, real = [self.live[slot]], len(self.live[slot].tokens)
        longest = real
        for row in self.live[slot + 1 :] if not group[0].fed else ():
            longest, real = max(longest, len(row.tokens)), real + len(row.tokens)
            padded = longest * (len(group) + 1)
            if padded > min(2 * real, FILL_TOKENS):
                break
            group.append(row)
        return group


def generate(
    runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling], *, logprobs: bool = False
) -> list[Row]:
    """Continue every prompt and return the rows in their order. One `sampling` for all, or one for each."""
    rules = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    decoder = Decoder(runner, logprobs=logprobs)
    rows = [decoder.add(prompt, rule) for prompt, rule in zip(prompts, rules, strict=True)]
    decoder.run()
    return rows
