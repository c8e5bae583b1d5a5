"""Templated word problems with small numbers, their steps and their verified answer; a template is a structure told as one story."""

from random import Random

from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.check import fault
from llmtrain.data.metaladder.problem import Problem
from llmtrain.data.metaladder.stories import NAMES, STORIES, Story
from llmtrain.data.metaladder.structures import STRUCTURES, numbers

PATIENCE = 500
"""Instances in a row that were drawn before, after which a template counts as used up."""


class Procedural:
    """Problems of our own templates, `structure/story`; numbers are of 2..`largest`."""

    fresh = True

    def __init__(self, *, largest: int = 20, seed: int = 0):
        self._largest, self._seed = largest, seed
        self._stories = {f"{story.structure}/{story.name}": story for story in STORIES}

    @property
    def templates(self) -> list[str]:
        """Names of all templates."""
        return list(self._stories)

    def draw(self, template: str, count: int) -> list[Problem]:
        """`count` different instances; the same ones for the same seed. Raises DataError if the numbers allow fewer."""
        story, draw, found = self._stories[template], Random(f"{self._seed}/{template}"), {}
        misses = 0
        while len(found) < count and misses < PATIENCE:
            problem = instance(story, draw, largest=self._largest, id=f"{template}/{len(found)}")
            misses = misses + 1 if problem.question in found else 0
            found.setdefault(problem.question, problem)
        if len(found) < count:
            short = f"template {template} has only some {len(found)} instances with numbers up to {self._largest}, {count} were asked for"
            raise DataError(f"{short}; raise --largest, or lower --problems and --test")
        return list(found.values())


def instance(story: Story, draw: Random, *, largest: int, id: str) -> Problem:
    """A story with numbers, names and things drawn. Raises DataError if its steps do not lead to its answer."""
    structure = STRUCTURES[story.structure]
    values = numbers(structure, draw, largest=largest)
    name, other = draw.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": draw.choice(story.things)} | {key: str(value) for key, value in values.items()}
    lines = []
    for text, (result, left, operation, right) in zip(story.steps, structure.steps, strict=True):
        lines.append(f"{text.format(**words)} {values[left]} {operation} {values[right]} = {values[result]} {words['things']}.")
    answer = str(values[structure.steps[-1][0]])
    solution = " ".join([*lines, f"The answer is {answer}."])
    if problem := fault(solution, answer):
        raise DataError(f"template {story.structure}/{story.name}: {problem}")
    return Problem(id, f"{story.structure}/{story.name}", story.question.format(**words), solution, answer, structure.strategy)
