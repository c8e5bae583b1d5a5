"""From a rung to what is trained on: the prompt and the response of every variant (MetaLadder, section 3 and its ablations).

The paper's names: Q question, C solution, S problem type and solution method, Q' and C' those of the similar problem, R a reflection. The
response of MetaLadder is S Q' C' Q C, the second Q being an exact copy of the question (the restating).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.problem import Problem, Rung

PROMPT = "### Instruction:\n{question}\n\n### Response: Let's think step by step."
SIMILAR, SIMILAR_SOLUTION = "Similar Problem:", "Solution to the Similar Problem:"
ORIGINAL, ORIGINAL_SOLUTION = "Original Problem:", "Solution to the Original Problem:"
REFLECTION = "Reflection:"
SEPARATOR = "\n\n"
REVERSE = "+reverse"


@dataclass(frozen=True)
class Variant:
    """How a rung becomes responses."""

    parts: str
    """Letters in order: S, q and c (the similar problem's), Q, C, R."""
    what: str
    augmented: bool = False
    """The similar problem is an example of its own as well."""


VARIANTS = {
    "cot": Variant("C", "the solution alone"),
    "metaladder": Variant("SqcQC", "type and method, similar problem and its solution, the problem restated, its solution"),
    "no_strategy": Variant("qcQC", "without type and method"),
    "no_analogy": Variant("SQC", "without the similar problem: type and method, restated, solution"),
    "no_restate": Variant("SqcC", "without restating"),
    "post": Variant("QCSqc", "restated and solved first, the similar problem after it (Post-MetaLadder)"),
    "analogyaug": Variant("C", "the solution alone, and the similar problem as an example of its own", augmented=True),
    "refaug": Variant("CR", "the solution, then a reflection on it"),
    "pre_refaug": Variant("RC", "the reflection before the solution"),
}


def prompt(question: str) -> str:
    """What every variant is trained and asked with."""
    return PROMPT.format(question=question)


def response(rung: Rung, variant: str) -> str:
    """The text that a model of this variant is trained to answer. Raises DataError if the rung lacks a part."""
    parts = _find(variant).parts
    if parts == "C":
        return rung.problem.solution.strip()
    return SEPARATOR.join(_PARTS[letter](rung, variant) for letter in parts)


def examples(rungs: Iterable[Rung], variant: str) -> Iterator[dict]:
    """Training examples {prompt, response, id, template, variant, answer}; `NAME+reverse` adds every rung swapped.

    Raises DataError for an unknown variant, or a rung that lacks a part of it.
    """
    name, reverse = variant.removesuffix(REVERSE), variant.endswith(REVERSE)
    for rung in rungs:
        yield from _examples_of(rung, name, variant, mark="")
        if reverse:
            yield from _examples_of(rung.swapped(), name, variant, mark="reversed-")


def _examples_of(rung: Rung, name: str, variant: str, *, mark: str) -> Iterator[dict]:
    def example(of: Rung, prefix: str) -> dict:
        problem = of.problem
        texts = {"prompt": prompt(problem.question), "response": response(of, name)}
        known = {"id": prefix + problem.id, "template": problem.template, "split": "train", "variant": variant, "answer": problem.answer}
        return texts | known

    yield example(rung, mark)
    if _find(name).augmented and not mark:  # a swapped rung's similar problem is the one that is there already
        yield example(rung.swapped(), "similar-")


def _find(variant: str) -> Variant:
    if variant not in VARIANTS:
        raise DataError(f"variant {variant!r}: allowed are {', '.join(VARIANTS)}, each also with {REVERSE}")
    return VARIANTS[variant]


def possible(rungs: list[Rung]) -> list[str]:
    """The variants for which every rung has all parts."""
    return [name for name in VARIANTS if all(_has(rung, name) for rung in rungs)]


def _has(rung: Rung, name: str) -> bool:
    try:
        response(rung, name)
        return not VARIANTS[name].augmented or rung.similar is not None
    except DataError:
        return False


def _own(header: str, value: Callable[[Problem], str]) -> Callable[[Rung, str], str]:
    return lambda rung, variant: f"{header}\n{_text(value(rung.problem), rung, variant, header)}"


def _analogue(header: str, value: Callable[[Problem], str]) -> Callable[[Rung, str], str]:
    return lambda rung, variant: f"{header}\n{_text(value(rung.similar) if rung.similar else '', rung, variant, header)}"


def _text(value: str, rung: Rung, variant: str, what: str) -> str:
    if not value.strip():
        hint = "; reflections come from a teacher, or from a field `reflection` of the problems" if what == REFLECTION else ""
        raise DataError(f"problem {rung.problem.id}: variant {variant} needs a part that it lacks: {what.rstrip(':')}{hint}")
    return value.strip()


_PARTS: dict[str, Callable[[Rung, str], str]] = {
    "S": lambda rung, variant: _text(rung.problem.strategy, rung, variant, "type of problem and solution method"),
    "q": _analogue(SIMILAR, lambda p: p.question),
    "c": _analogue(SIMILAR_SOLUTION, lambda p: p.solution),
    "Q": _own(ORIGINAL, lambda p: p.question),
    "C": _own(ORIGINAL_SOLUTION, lambda p: p.solution),
    "R": _own(REFLECTION, lambda p: p.reflection),
}
