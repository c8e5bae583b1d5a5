"""Needle in a haystack: does a model find one sentence at a given depth of a long text?

Two measures. By generation: the greedy continuation of the question is the answer. By likelihood: the answer is likelier than every
distractor; with `distractors` wrong answers, chance is 1 / (distractors + 1), and the answer's loss in nats is a graded number even where
no answer is ever right, so that small models can be compared.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.cache import KVCache
from llmtrain.ops import Mask
from llmtrain.tools.open_model import OpenModel
from llmtrain.tools.progress import Progress

NEEDLE = "\nThe secret number of {name} is{answer}.\n"
QUESTION = "\nThe secret number of {name} is"
NAMES = ("Rome", "Paris", "London", "Venice", "Athens", "Vienna", "Messina", "Verona", "Milan", "Cyprus")
DIGITS = 5


@dataclass(frozen=True)
class Found:
    """The trials at one length and depth."""

    length: int
    """Tokens of the whole prompt, question included."""
    depth: float
    """Where the needle stands: 0 at the beginning, 1 just before the question."""
    trials: int
    exact: float
    """Share of trials in which the greedy continuation is the answer."""
    chosen: float
    """Share in which the answer is likelier than every distractor."""
    loss: float
    """Mean loss of the answer's tokens, in nats per token."""


@dataclass(frozen=True)
class Trial:
    """One prompt with the right answer and wrong ones, as tokens."""

    prompt: list[int]
    answer: list[int]
    distractors: list[list[int]]


def needle(
    opened: OpenModel,
    haystack: Sequence[int],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 3,
    distractors: int = 9,
    seed: int = 1234,
) -> list[Found]:
    """Every length x depth, with the same needles in each.

    `haystack` is the text as tokens; each trial takes another stretch of it. Raises UserError if it or the model is too short.
    """
    _check(opened, haystack, lengths, depths)
    results = []
    with Progress("needle", sum(lengths) * len(depths) * trials, "tokens") as progress:
        done = 0
        for length in lengths:
            for depth in depths:
                outcomes = []
                for trial in _trials(opened, haystack, length, depth, trials=trials, distractors=distractors, seed=seed):
                    outcomes.append(ask(opened.model, trial))
                    done += length
                    progress.at(done)
                exact, chosen, loss = (sum(values) / trials for values in zip(*outcomes))
                results.append(Found(length, depth, trials, exact, chosen, loss))
    return results


def ask(model, trial: Trial) -> tuple[bool, bool, float]:
    """(the greedy continuation is the answer, the answer is the likeliest, its loss in nats per token)."""
    scores, greedy = answer_scores(model, trial)
    return greedy, scores[0] > max(scores[1:]), -scores[0] / len(trial.answer)


@torch.inference_mode()
def answer_scores(model, trial: Trial) -> tuple[list[float], bool]:
    """log-probabilities in nats of the answer and of each distractor, and whether the greedy continuation is the answer.

    The prompt goes through the model once; each answer continues from its keys and values.
    """
    device = next(model.parameters()).device
    cache = KVCache(len(trial.prompt) + max(len(trial.answer), *(len(d) for d in trial.distractors)))

    def run(tokens: list[int]) -> Tensor:
        return model(torch.tensor([tokens], device=device), mask=Mask(), cache=cache, last=len(tokens))["logits"][0]

    model(torch.tensor([trial.prompt[:-1]], device=device), mask=Mask(), cache=cache, last=0)
    scores, greedy = [], False
    for index, answer in enumerate([trial.answer, *trial.distractors]):
        cache.truncate(len(trial.prompt) - 1)
        logits = run([trial.prompt[-1], *answer[:-1]]).double()  # [answer,V]
        targets = torch.tensor(answer, device=device)
        scores.append(float(torch.log_softmax(logits, -1).gather(-1, targets[:, None]).sum()))
        if index == 0:
            greedy = bool((logits.argmax(-1) == targets).all())  # each step's likeliest given the right ones before: the greedy path
    return scores, greedy


def _trials(
    opened: OpenModel, haystack: Sequence[int], length: int, depth: float, *, trials: int, distractors: int, seed: int
) -> Iterator[Trial]:
    encode = opened.need_tokenizer().encode
    draw = random.Random(seed)
    for number in range(trials):
        name = NAMES[number % len(NAMES)]
        answers = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), distractors + 1)
        right, *wrong = (encode(f" {answer}") for answer in answers)
        question = encode(QUESTION.format(name=name))
        sentence = encode(NEEDLE.format(name=name, answer=f" {answers[0]}"))
        room = length - len(opened.prefix) - len(sentence) - len(question)
        if room < 1:
            raise UserError(f"--lengths {length}: needle and question alone have {length - room} tokens; give a larger length")
        start = draw.randrange(max(1, len(haystack) - room + 1))
        hay = list(haystack[start : start + room])
        cut = round(depth * len(hay))
        yield Trial([*opened.prefix, *hay[:cut], *sentence, *hay[cut:], *question], right, wrong)


def _check(opened: OpenModel, haystack: Sequence[int], lengths: Sequence[int], depths: Sequence[float]) -> None:
    longest = max(lengths)
    if len(haystack) < longest:
        raise UserError(f"the haystack has {len(haystack)} tokens, --lengths asks for {longest}; give a longer --text")
    if opened.cfg.position.kind == "learned" and longest + 8 > opened.cfg.max_seq_len:
        raise UserError(f"--lengths {longest}: the model has {opened.cfg.max_seq_len} learned positions (model.max_seq_len)")
    if longest > opened.cfg.max_seq_len:
        print(f"--lengths {longest}: the model was made for {opened.cfg.max_seq_len} tokens (model.max_seq_len)", file=sys.stderr)
    if any(not 0 <= depth <= 1 for depth in depths):
        raise UserError(f"--depths {list(depths)}: allowed are 0 to 1")


def table(results: Sequence[Found]) -> str:
    """Markdown: a row per length, per depth `exact / chosen / loss`."""
    depths = sorted({r.depth for r in results})
    lines = ["| tokens | " + " | ".join(f"depth {d:g}" for d in depths) + " |", "|--:|" + "--:|" * len(depths)]
    for length in dict.fromkeys(r.length for r in results):
        cells = {r.depth: f"{r.exact:.0%} / {r.chosen:.0%} / {r.loss:.2f}" for r in results if r.length == length}
        lines.append(f"| {length:,} | " + " | ".join(cells[d] for d in depths) + " |")
    return "\n".join(lines)


def plot(results: Sequence[Found], path) -> None:
    """A picture of the answer's loss by length and depth; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths, lengths = sorted({r.depth for r in results}), list(dict.fromkeys(r.length for r in results))
    grid = [[next(r.loss for r in results if (r.length, r.depth) == (n, d)) for n in lengths] for d in depths]
    figure, axes = plt.subplots(figsize=(1.5 + 0.8 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="RdYlGn_r", vmin=0)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    axes.set(xlabel="prompt, tokens", ylabel="depth of the needle", title="loss of the answer")
    figure.colorbar(image, label="nats/token")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def as_json(results: Sequence[Found]) -> list[dict]:
    """The results as plain values."""
    return [asdict(r) for r in results]
