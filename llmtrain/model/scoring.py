"""How likely a model finds given tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from llmtrain.ops import Mask


class Score(NamedTuple):
    """The log-probability of a continuation."""

    logprob: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether every token of it is the likeliest one."""


Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens that are given (at least one) and the tokens after them that are scored (at least one)."""


def score(model, pairs: Sequence[Pair], *, batch: int = 8, done: Callable[[int], None] = lambda n: None) -> list[Score]:
    """The score of every (context, continuation), in order; `batch` rows at a time, longest first, `done(n)` told how many are ready.

    Rows are padded on the right, behind all that they see, so a row's score does not depend on its neighbours (up to rounding).
    """
    for context, continuation in pairs:
        if not len(context) or not len(continuation):
            raise ValueError(f"score needs a context and a continuation of at least one token, got {len(context)} and {len(continuation)}")
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    scores: list[Score | None] = [None] * len(pairs)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for row, value in zip(rows, _score_batch(model, [pairs[i] for i in rows])):
            scores[row] = value
        done(start + len(rows))
    return scores


@torch.inference_mode()
def _score_batch(model, pairs: Sequence[Pair]) -> Iterator[Score]:
    inputs = [[*context, *continuation][:-1] for context, continuation in pairs]
    longest = max(map(len, inputs))
    device = next(model.parameters()).device
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=device)
    first = min(len(context) for context, _ in pairs) - 1  # the first position whose logits are needed
    logits = model(tokens, mask=Mask(), last=longest - first)["logits"]  # [B,S,V]
    values = []
    for row, (context, continuation) in zip(logits, pairs):
        begin = len(context) - 1 - first
        part = row[begin : begin + len(continuation)]
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        targets = torch.tensor(continuation, device=device)
        chosen = part.gather(-1, targets[:, None])[:, 0] - part.logsumexp(-1)
        values.append(Score(float(chosen.double().sum()), bool((part.argmax(-1) == targets).all())))
    return iter(values)


class Window(NamedTuple):
    """tokens[begin:end], of which those from `scored` on count."""

    begin: int
    scored: int
    end: int


def windows(length: int, *, context: int, stride: int | None = None) -> list[Window]:
    """Cut `length` tokens into windows of at most `context`, each beginning `stride` after the one before (context if not given).

    Every token but the first is scored once: with as much context as its window offers, the last `stride` tokens of later windows. Without
    overlap the first token of every window has no context and is left out.
    """
    stride = stride or context
    if context < 2 or not 0 < stride <= context:
        raise ValueError(f"context {context}, stride {stride}: allowed are context >= 2 and 0 < stride <= context")
    found, reached = [], 0
    for begin in range(0, max(length - 1, 0), stride):
        end = min(begin + context, length)
        found.append(Window(begin, max(reached, begin + 1), end))
        reached = end
        if end == length:
            break
    return found


@torch.inference_mode()
def cross_entropy_sum(
    model, tokens: Sequence[int], *, context: int, stride: int | None = None, done: Callable[[int], None] = lambda n: None
) -> tuple[float, int]:
    """(nats, tokens counted) of `tokens` in `windows`. Goes through the model's own loss, so the logits of a window never exist whole."""
    device = next(model.parameters()).device
    ids, total, count = torch.as_tensor(tokens, dtype=torch.int64), 0.0, 0
    for window in windows(len(ids), context=context, stride=stride):
        targets = ids[window.begin + 1 : window.end].clone()
        targets[: window.scored - window.begin - 1] = -100
        part = ids[window.begin : window.end - 1][None].to(device)
        total += float(model(part, mask=Mask(), targets=targets[None].to(device))["ce_sum"])
        count += window.end - window.scored
        done(window.end)
    return total, count
