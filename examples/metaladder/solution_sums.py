"""What goes wrong in solutions: the sum they begin with, or what sums come to."""

import json
from pathlib import Path

from llmtrain.data.metaladder.check import equations, false_equation
from llmtrain.data.metaladder.problem import read_problems
from llmtrain.data.metaladder.render import ORIGINAL_SOLUTION


def shares(answers: Path, problems: Path) -> tuple[float, float]:
    """(share of the answers whose solution begins with the sum that the problem's begins with, share in which every sum is true)."""
    solutions = {problem.id: problem.solution for problem in read_problems(problems)}
    begun = true = 0
    answered = json.loads(answers.read_text(encoding="utf-8"))["answers"]
    for answer in answered:
        solution = answer["text"].rpartition(ORIGINAL_SOLUTION)[2]
        sums = equations(solution)
        begun += bool(sums) and sums[0][0] == equations(solutions[answer["id"]])[0][0]
        true += bool(sums) and not false_equation(solution)
    return begun / len(answered), true / len(answered)
