"""Which problems are trained on and which are asked: whole templates are held out, and of the others instances."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.problem import Problem, Rung


class Source(Protocol):
    """Where problems come from."""

    templates: list[str]
    fresh: bool
    """Whether there are as many instances as wanted; else similar problems are other training problems of the template."""

    def draw(self, template: str, count: int) -> list[Problem]:
        """Up to `count` different problems, always the same ones, fewer being the first of more."""


@dataclass
class Split:
    """No question is in two of these, and no template of `unseen_templates` in the others."""

    rungs: list[Rung] = field(default_factory=list)
    validation: list[Problem] = field(default_factory=list)
    unseen_instances: list[Problem] = field(default_factory=list)
    unseen_templates: list[Problem] = field(default_factory=list)
    alone: int = 0
    """Training problems without a similar one."""


def held_out(templates: Sequence[str], *, share: float, seed: int) -> set[str]:
    """Templates to hold out. Of `structure/story` some stories of every structure, so that no structure is new; else some of all."""
    groups: dict[str, list[str]] = {}
    for template in templates:
        groups.setdefault(template.partition("/")[0], []).append(template)
    if max(map(len, groups.values())) == 1:
        groups = {"": list(templates)}
    draw, out = Random(f"{seed}/held out"), set()
    for members in groups.values():
        count = min(len(members) - 1, max(1, round(share * len(members)))) if share > 0 else 0
        out.update(draw.sample(sorted(members), count))
    return out


def split(source: Source, *, problems: int, test: int, validation: int, share: float, seed: int, similar: bool = True) -> Split:
    """Draw training problems with similar ones, validation problems, and both test sets.

    Args:
        problems, test, validation: how many of each in all (`test` of each of the two sets), shared evenly between templates.
        share: of the templates that are held out.
        similar: pair training problems with similar ones; False leaves that to a teacher.

    Raises:
        DataError: the source has too few problems.
    """
    out = held_out(source.templates, share=share, seed=seed)
    kept = [name for name in source.templates if name not in out]
    if not kept:
        raise DataError("no template is left to train on; lower --held-out")
    result, draw = Split(), Random(f"{seed}/order")
    for place, template in enumerate(kept):
        wanted = [_part(n, place, len(kept)) for n in (test, validation, problems)]
        asked, checked, trained = _cut(source, template, wanted, fresh=source.fresh and similar)
        result.unseen_instances += asked
        result.validation += checked
        result.rungs += _pairs(trained, wanted[2], fresh=source.fresh) if similar else [Rung(p) for p in trained]
    for place, template in enumerate(sorted(out)):
        result.unseen_templates += source.draw(template, _part(test, place, len(out)))
    result.alone = sum(r.similar is None for r in result.rungs) if similar else 0
    result.rungs = [r for r in result.rungs if r.similar is not None or not similar]
    for part in (result.rungs, result.validation, result.unseen_instances, result.unseen_templates):
        draw.shuffle(part)
    if not result.rungs:
        raise DataError("no problem has a similar one: every label stands for a single problem; choose another --label-field, or a teacher")
    return result


def _part(total: int, place: int, parts: int) -> int:
    return total // parts + (place < total % parts)


def _cut(source: Source, template: str, wanted: list[int], *, fresh: bool) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Problems of one template to ask, to validate with and to train on; of a finite source at most a quarter for each of the first two."""
    test, validation, train = wanted
    found = source.draw(template, test + validation + train * (2 if fresh else 1))
    if not source.fresh:
        test, validation = min(test, len(found) // 4), min(validation, len(found) // 4)
    return found[:test], found[test : test + validation], found[test + validation :]


def _pairs(found: list[Problem], count: int, *, fresh: bool) -> list[Rung]:
    """Problems with another one of the same template each: one that is used nowhere else, or the next one of a finite source."""
    if fresh:
        half = min(count, len(found) // 2)
        return [Rung(a, b) for a, b in zip(found[:half], found[half : 2 * half])]
    found = found[:count]
    return [Rung(p, found[(n + 1) % len(found)] if len(found) > 1 else None) for n, p in enumerate(found)]
