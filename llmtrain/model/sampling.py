"""From logits to tokens: greedy, temperature, top-k, nucleus; each row by its own rule and its own random numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.errors import UserError

CANDIDATES = 1024
"""Likeliest tokens looked at first; a nucleus that does not fit is found by sorting the whole vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """How one sequence is continued. Raises UserError for values that mean nothing."""

    max_new: int = 128
    """Tokens to add at most."""
    temperature: float = 0.8
    """Logits are divided by this; 0 takes the likeliest token (the lowest id of equals)."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities reach this (nucleus sampling, arXiv 1904.09751)."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is no limit."""
    seed: int = 1234
    """The sequence's random numbers follow from it alone, whatever stands beside it in a batch."""
    stop_ids: tuple[int, ...] = ()
    """A token of these ends the sequence and is not part of it."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            given = f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}"
            raise UserError(f"{given}: allowed are temperature >= 0, 0 < top_p <= 1, top_k >= 0")
        if self.max_new < 0:
            raise UserError(f"max_new {self.max_new}: allowed is 0 or more")


class Sampler:
    """Draws the tokens of one sequence: one random number per token, from a generator of its own."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """One token from logits [V]. Computed in float64 on the CPU, so that equal logits and seed give an equal token everywhere."""
        rule = self.sampling
        logits = logits.detach().to("cpu", torch.float64)
        if rule.temperature == 0:
            return int(logits.argmax())
        point = torch.rand((), generator=self._generator, dtype=torch.float64)
        probabilities = torch.softmax(logits / rule.temperature, -1)
        if rule.top_p == 1 and rule.top_k == 0:
            return _at(point, probabilities, None)
        return _at(point, *_nucleus(probabilities, top_p=rule.top_p, top_k=rule.top_k))


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token per row of logits [B,V], each by its own sampler. Raises UserError if a row holds NaN or plus infinity, or nothing else
    than minus infinity."""
    highest, likeliest = logits.detach().max(-1)
    if not torch.isfinite(highest).all():
        raise UserError("the logits are not finite: the model's weights hold NaN or infinities, or its dtype overflows")
    likeliest = likeliest.tolist()
    if any(s.sampling.temperature for s in samplers):
        logits = logits.detach().cpu()
    return [s.draw(row) if s.sampling.temperature else token for s, row, token in zip(samplers, logits, likeliest)]


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """log softmax(logits [B,V]) at one token per row, in nats, whatever the rule they were drawn by."""
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return (chosen - logits.logsumexp(-1)).tolist()


def _nucleus(probabilities: Tensor, *, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Probabilities [n] that are kept, likeliest first (of equals the lower id), and their ids [n]."""
    size = len(probabilities)
    for candidates in (min(CANDIDATES, size), size):
        values, ids = probabilities.topk(candidates, sorted=False)
        order = ids.argsort()
        order = order[values[order].argsort(descending=True, stable=True)]
        values, ids = values[order], ids[order]
        kept = int((values.cumsum(-1) - values < top_p).sum())  # the first always stays
        kept = min(kept, top_k or kept)
        # Of tokens as likely as the last candidate some may have been left out; then those kept must be likelier.
        if candidates == size or values[kept - 1] > values[-1]:
            break
    return values[:kept], ids[:kept]


def _at(point: Tensor, probabilities: Tensor, ids: Tensor | None) -> int:
    """The token at which the running sum of probabilities passes `point` of the whole."""
    running = probabilities.cumsum(-1)
    index = int(torch.searchsorted(running, point * running[-1], right=True).clamp_(max=len(running) - 1))
    return index if ids is None else int(ids[index])
