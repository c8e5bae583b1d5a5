"""Answers: found in texts as MetaLadder's evaluation finds them, and compared without being evaluated."""

import time
from fractions import Fraction

import pytest

from llmtrain.data import answers, symbolic
from llmtrain.data.answers import equal, extract, number
from llmtrain.errors import UserError

needs_library = pytest.mark.skipif(not symbolic.available(), reason="math-verify is not installed")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("First \\boxed{3}, so \\boxed{\\frac{1}{2}} it is. The answer is 9.", "\\frac{1}{2}"),
        ("\\boxed{a_{1}^{2}} end", "a_{1}^{2}"),
        ("An open \\boxed{5 and 7", "7"),
        ("The answer is 4. No: the answer is: 8 apples.\nThen 3.", "8 apples"),
        ("the final answer is $12$", "12"),
        ("7 * 3 = 21\n#### 21", "21"),
        ("There are 1,234 and then 5.5", "5.5"),
        ("It is 3/4 of it", "3/4"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_extraction(text, found):
    assert extract(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200", 1200),
        ("$3.50", Fraction(7, 2)),
        ("-3/4", Fraction(-3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("8 apples", 8),
        ("40%", 40),
        ("1e3", 1000),
        (".5", Fraction(1, 2)),
        ("$7$", 7),
        ("\\text{ 7 }", 7),
        ("1/0", None),
        ("x", None),
        ("", None),
        ("1e999999999", None),
        ("3x", None),
    ],
)
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("8 apples", "8", True),
        ("0.5", "1/2", True),
        ("0.3333", "1/3", True),
        ("0.33", "1/3", False),
        ("1000001", "1000000", False),
        ("1,000", "1000", True),
        ("40%", "0.4", True),
        ("40", "0.4", False),
        ("-3", "3", False),
        (None, "3", False),
        ("abc", "3", False),
        ("3.", "3", True),
    ],
)
def test_numeric_equality(given, expected, same):
    assert equal(given, expected) is same


def test_hostile_texts_take_no_time():
    started = time.perf_counter()
    for text in (
        "9" * 100_000,
        "1," * 50_000,
        "\\boxed{" * 20_000,
        "the answer is " * 20_000,
        "-" * 50_000 + "1",
        "1e99999999",
        " " * 50_000 + "1",
    ):
        equal(extract(text), "7", symbolic=False)
        answers.clean(text)
    assert time.perf_counter() - started < 2


@needs_library
def test_symbolic_equality():
    assert equal("\\sqrt{49}", "7") and equal("(x+1)^2", "x^2+2x+1") and equal("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}")
    assert not equal("x+1", "x+2") and not equal("\\sqrt{48}", "7")


@needs_library
def test_an_expression_that_never_ends_is_killed_and_the_next_one_compared():
    comparer = symbolic.Comparer(seconds=1.0)
    started = time.perf_counter()
    assert comparer.same("9^{9^{9^{9}}}", "7") is False and comparer.timeouts == 1 and time.perf_counter() - started < 30
    assert comparer.same("\\sqrt{49}", "7") is True and comparer.timeouts == 1
    comparer.close()


@needs_library
def test_no_text_is_run_as_python(tmp_path):
    target = tmp_path / "made"
    equal(f"__import__('pathlib').Path('{target}').touch()", "x=1")
    assert not target.exists()


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(symbolic, "available", lambda: False)
    assert not equal("\\sqrt{49}", "7")  # a number was expected, this is none
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[math\]'"):
        equal("x+1", "1+x")
