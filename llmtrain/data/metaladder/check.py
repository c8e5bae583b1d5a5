"""Whether a solution holds together: every equation in it is true, and it states the answer that it arrives at."""

import re
from fractions import Fraction

from llmtrain.data.answers import equal, extract, number

NUMBER = r"-?\$?\d[\d,]{0,20}(?:\.\d{1,12})?"
EQUATION = re.compile(rf"(?<![\d.,/*+-])({NUMBER}(?:\s{{0,2}}[-+*/×÷x]\s{{0,2}}{NUMBER})+)\s{{0,2}}=\s{{0,2}}({NUMBER})(?![\d,.]*[%\d])")
PART_OF_MORE = re.compile(r"(?:[-+*/×÷^(]|\d\s?x|\sx)\s{0,2}$")
"""Before an equation's first number: then its left side begins further ahead, with words or brackets in it."""
TERM = re.compile(rf"([-+*/×÷x])?\s*({NUMBER})")
TOLERANCE = Fraction(1, 100)
"""Solutions may round to cents."""


def equations(text: str) -> list[tuple[str, str]]:
    """Both sides of the equations of plain numbers in a text: ("5 + 3 * 2", "11")."""
    return [(m[1], m[2]) for m in EQUATION.finditer(text) if not PART_OF_MORE.search(text[max(0, m.start() - 8) : m.start()])]


def fault(solution: str, answer: str) -> str | None:
    """What is wrong with a worked solution, in words; None if nothing that can be checked is.

    Checked are equations between plain numbers, and that the solution states `answer` at its end.
    """
    if wrong := false_equation(solution):
        return f"{wrong} is not true"
    stated = extract(solution)
    if stated is None:
        return "it states no answer"
    return None if equal(stated, answer, symbolic=False) else f"it states the answer {stated}, not {answer}"


def false_equation(text: str) -> str | None:
    """The first equation of plain numbers in a text that is not true: "2 + 2 = 5"."""
    for left, right in equations(text):
        value, stated = _value(left), number(right)
        if value is not None and stated is not None and abs(value - stated) > TOLERANCE:
            return f"{left} = {right}"
    return None


def _value(expression: str) -> Fraction | None:
    """The value of numbers joined by + - * /, products before sums; None if it divides by 0."""
    total, product = Fraction(0), None
    position = 0
    while match := TERM.match(expression, position):
        operation, value = match[1], number(match[2])
        position = match.end()
        while position < len(expression) and expression[position] == " ":
            position += 1
        if value is None:
            return None
        if product is None:
            product = value
        elif operation in ("*", "×", "x"):
            product *= value
        elif operation in ("/", "÷"):
            if value == 0:
                return None
            product /= value
        else:
            total, product = total + product, value if operation == "+" else -value
    return total + (product or 0) if position == len(expression) else None
