"""What a teacher is asked for, and what is made of its answer: type and method, a similar problem and its solution, or a reflection."""

import re
from dataclasses import replace

from llmtrain.data.answers import extract
from llmtrain.data.metaladder.check import fault
from llmtrain.data.metaladder.problem import Problem, Rung

Messages = list[dict[str, str]]
TYPE, SIMILAR, SOLUTION = "### Type of Problem and Solution Method", "### Similar Problem", "### Solution to the Similar Problem"
REFLECTION = "### Reflection"

LADDER = f"""You teach mathematics and prepare a worksheet. You are given a problem and its solution.
Write three sections, with exactly these headings:

{TYPE}
Two or three sentences: which kind of problem it is, which method solves it, and the idea that matters most. No numbers of this problem.

{SIMILAR}
A new problem that is solved by the same steps in the same order, about other things, with other numbers or variables.

{SOLUTION}
Its solution, step by step, each calculation as an equation, ending with the sentence: The answer is X.

### Example of an original problem
A tank holds 80 litres. It gains a quarter of that, then loses 30 litres. How much is in it?

### Example of its solution
A quarter of 80 is 80 / 4 = 20. The tank then has 80 + 20 = 100 litres, and at the end 100 - 30 = 70. The answer is 70.

{TYPE}
This is a problem of successive changes, of which the first is a part of the beginning. Find the size of that part, then follow the changes
one after another. What matters is what the part is taken of.

{SIMILAR}
A library has 60 books. It buys a third as many again, then lends 25. How many books are in it?

{SOLUTION}
A third of 60 is 60 / 3 = 20. With them there are 60 + 20 = 80 books, and 80 - 25 = 55 stay. The answer is 55."""

REFLECT = f"""You teach mathematics. You are given a problem and its solution. Write one section with exactly this heading:

{REFLECTION}
Look back at the solution in a few sentences: another way to get there, or what changes when the problem is made more general.
Do not repeat the solution."""

RECHECK = "Solve the problem step by step, and end with the sentence: The answer is X."


def ladder_request(problem: Problem) -> Messages:
    """Ask for S, Q' and C'."""
    return _ask(LADDER, f"### Original Problem\n{problem.question}\n\n### Solution to the Original Problem\n{problem.solution}")


def reflection_request(problem: Problem) -> Messages:
    """Ask for R."""
    return _ask(REFLECT, f"### Original Problem\n{problem.question}\n\n### Solution to the Original Problem\n{problem.solution}")


def recheck_request(question: str) -> Messages:
    """Ask for a second solution of a question."""
    return _ask(RECHECK, question)


def _ask(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


class Malformed(Exception):
    """An answer of the teacher that cannot be used: `reason` is counted, the text says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read_ladder(problem: Problem, answer: str) -> Rung:
    """The rung that an answer to `ladder_request` gives. Raises Malformed if a section is missing or the solution is wrong."""
    found = sections(answer)
    for heading in (TYPE, SIMILAR, SOLUTION):
        if not found.get(_key(heading)):
            raise Malformed("a section is missing", heading.removeprefix("### "))
    strategy, question, solution = (found[_key(heading)] for heading in (TYPE, SIMILAR, SOLUTION))
    if _plain(question) == _plain(problem.question):
        raise Malformed("the similar problem is the original one")
    stated = extract(solution)
    if stated is None:
        raise Malformed("the similar solution states no answer")
    if wrong := fault(solution, stated):
        raise Malformed("the similar solution is wrong", wrong)
    similar = Problem(f"{problem.id}-similar", problem.template, question, solution, stated, strategy)
    return Rung(replace(problem, strategy=strategy), similar)


def read_reflection(answer: str) -> str:
    """The reflection of an answer to `reflection_request`. Raises Malformed if it has none."""
    text = sections(answer).get(_key(REFLECTION))
    if not text:
        raise Malformed("a section is missing", "Reflection")
    return text


def sections(text: str) -> dict[str, str]:
    """Sections by heading in small letters; of a heading that comes twice the last one counts, as models repeat what they were given."""
    parts = re.split(r"^#{1,6}\s*(.{1,80}?)\s*:?\s*$", text, flags=re.MULTILINE)
    return {_key(heading): body.strip() for heading, body in zip(parts[1::2], parts[2::2])}


def _key(heading: str) -> str:
    return re.sub(r"[#*\s]+", " ", heading).strip().rstrip(":").lower()


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()
