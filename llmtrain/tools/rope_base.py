"""The RoPE base for a context length, chosen by evaluation.

Pangu Ultra (arXiv 2504.07866, section on long-context extension) raises the base before it trains on longer sequences, and takes the
candidate that does best at the target length before any training there: needle retrieval, and a low initial loss.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from llmtrain.errors import UserError
from llmtrain.model.scoring import cross_entropy_sum
from llmtrain.tools.needle import needle
from llmtrain.tools.open_model import OpenModel

FACTORS = (1, 2, 4, 8, 16, 32, 64)
"""Candidates are the base in use times these. Pangu Ultra's own steps were 10 and 16."""


@dataclass(frozen=True)
class Candidate:
    """What one base gives at the target length."""

    base: float
    chosen: float
    """Share of needles found: the answer likelier than every distractor."""
    answer_loss: float
    """Loss of the needles' answers, in nats per token."""
    text_loss: float
    """Loss of plain text in windows of the target length, in nats per token."""


def compare(
    opened: OpenModel,
    tokens: Sequence[int],
    *,
    length: int,
    bases: Sequence[float],
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    trials: int = 3,
    windows: int = 2,
    seed: int = 1234,
) -> list[Candidate]:
    """Every base at `length` tokens, all on the same text and needles; the model's own base is set again at the end.

    `tokens` is the text, of which `windows` windows of `length` are scored. Raises UserError for a model without RoPE or too short a text.
    """
    if opened.cfg.position.kind != "rope":
        raise UserError(f"model.position.kind {opened.cfg.position.kind}: only rope has a base to choose")
    if len(tokens) < length:
        raise UserError(f"the text has {len(tokens)} tokens, --length asks for {length}; give a longer --text")
    own, results = opened.model.rope.base, []
    try:
        for base in bases:
            opened.model.set_rope_base(base)
            found = needle(opened, tokens, lengths=[length], depths=depths, trials=trials, seed=seed)
            nats, count = cross_entropy_sum(opened.model, tokens[: windows * length], context=length)
            results.append(Candidate(base, _mean([f.chosen for f in found]), _mean([f.loss for f in found]), nats / count))
    finally:
        opened.model.set_rope_base(own)
    return results


def choose(candidates: Sequence[Candidate], by: str = "needle") -> Candidate:
    """The best: `needle`: most needles found, of equals the lowest loss of plain text; `loss`: that alone.

    The answer's loss does not decide: below the length a model was trained at it falls with smaller bases, which sharpen what is near.
    """
    if by == "loss":
        return min(candidates, key=lambda c: c.text_loss)
    return min(candidates, key=lambda c: (-c.chosen, c.text_loss))


def default_bases(opened: OpenModel) -> list[float]:
    """The base in use and its multiples."""
    return [opened.model.rope.base * factor for factor in FACTORS]


def report(candidates: Sequence[Candidate], best: Candidate, *, length: int) -> str:
    """A Markdown table, and the lines for the phase that goes on at this length."""
    lines = ["| RoPE base | needles found | answer loss | text loss |", "|--:|--:|--:|--:|"]
    for c in candidates:
        mark = "**" if c is best else ""
        lines.append(f"| {mark}{c.base:.4g}{mark} | {c.chosen:.0%} | {c.answer_loss:.3f} | {c.text_loss:.4f} |")
    phase = f"  phases:\n    - {{seq_len: {length}, rope_base: {best.base!r}}}   # add its steps or tokens"
    return "\n".join(lines) + f"\n\ntrain:\n{phase}"


def as_json(candidates: Sequence[Candidate], best: Candidate) -> dict:
    """The results as plain values."""
    return {"candidates": [asdict(c) for c in candidates], "best": best.base}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
