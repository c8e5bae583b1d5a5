"""The problems of our own templates, how they are split, and the exact text of every variant."""

import json
import re
from dataclasses import replace

import pytest

from llmtrain.data.errors import DataError
from llmtrain.data.metaladder import build
from llmtrain.data.metaladder.check import equations, fault
from llmtrain.data.metaladder.labelled import Fields, Labelled, described, normalised
from llmtrain.data.metaladder.problem import Problem, Rung, read_rungs, write_rungs
from llmtrain.data.metaladder.procedural import Procedural
from llmtrain.data.metaladder.render import VARIANTS, examples, possible, response
from llmtrain.data.metaladder.split import held_out, split
from llmtrain.tools import data

ONE = Problem("1", "t", "How many?", "2 + 3 = 5. The answer is 5.", "5", "Add.", "Or count.")
TWO = Problem("2", "t", "How much?", "1 + 1 = 2. The answer is 2.", "2", "Add too.")
RUNG = Rung(ONE, TWO)
SIMILAR = "Similar Problem:\nHow much?\n\nSolution to the Similar Problem:\n1 + 1 = 2. The answer is 2."
ORIGINAL = "Original Problem:\nHow many?"
SOLVED = "Solution to the Original Problem:\n2 + 3 = 5. The answer is 5."


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("cot", ONE.solution),
        ("metaladder", f"Add.\n\n{SIMILAR}\n\n{ORIGINAL}\n\n{SOLVED}"),
        ("no_strategy", f"{SIMILAR}\n\n{ORIGINAL}\n\n{SOLVED}"),
        ("no_analogy", f"Add.\n\n{ORIGINAL}\n\n{SOLVED}"),
        ("no_restate", f"Add.\n\n{SIMILAR}\n\n{SOLVED}"),
        ("post", f"{ORIGINAL}\n\n{SOLVED}\n\nAdd.\n\n{SIMILAR}"),
        ("analogyaug", ONE.solution),
        ("refaug", f"{SOLVED}\n\nReflection:\nOr count."),
        ("pre_refaug", f"Reflection:\nOr count.\n\n{SOLVED}"),
    ],
)
def test_the_text_of_every_variant(variant, text):
    assert response(RUNG, variant) == text
    first = next(examples([RUNG], variant))
    assert first["prompt"] == "### Instruction:\nHow many?\n\n### Response: Let's think step by step."
    assert (first["response"], first["answer"], first["template"], first["split"]) == (text, "5", "t", "train")


def test_augmented_and_reversed_examples():
    assert [(x["id"], x["response"]) for x in examples([RUNG], "analogyaug")] == [("1", ONE.solution), ("similar-2", TWO.solution)]
    plain, swapped = examples([RUNG], "metaladder+reverse")
    assert plain["answer"] == "5" and swapped["answer"] == "2" and swapped["response"].startswith("Add too.\n\nSimilar Problem:\nHow many?")
    assert swapped["response"].endswith(TWO.solution) and swapped["id"] == "reversed-2"


def test_what_is_missing_is_named():
    with pytest.raises(
        DataError, match=r"problem 2: variant refaug needs a part that it lacks: Reflection; reflections come from a teacher"
    ):
        response(Rung(TWO), "refaug")
    with pytest.raises(DataError, match="needs a part that it lacks: Similar Problem"):
        response(Rung(ONE), "metaladder")
    with pytest.raises(DataError, match="variant 'metalader': allowed are cot, metaladder"):
        next(examples([RUNG], "metalader"))
    assert possible([RUNG]) == list(VARIANTS) and possible([RUNG, Rung(TWO, ONE)]) == [n for n in VARIANTS if "ref" not in n]
    assert possible([Rung(ONE)]) == ["cot", "no_analogy", "refaug", "pre_refaug"]


def test_every_template_gives_verified_problems_with_small_numbers():
    source = Procedural(largest=20, seed=3)
    assert len(source.templates) == 40 and len({name.partition("/")[0] for name in source.templates}) == 10
    for template in source.templates:
        problems = source.draw(template, 12)
        assert len({p.question for p in problems}) == 12
        for p in problems:
            assert fault(p.solution, p.answer) is None and equations(p.solution) and "{" not in p.question + p.solution
            assert max(map(int, re.findall(r"\d+", p.question + p.solution))) <= 20
            stated = re.findall(r"\d+", p.question)
            given = len(stated)
            assert given == (4 if "two_kinds" in template else 2 if "total" in template else 3), p.question
    assert source.draw("gain_loss/gift", 5) == source.draw("gain_loss/gift", 12)[:5]
    with pytest.raises(DataError, match="raise --largest"):
        Procedural(largest=12).draw("groups_used/bakery", 5000)


def test_a_wrong_step_is_seen():
    assert fault("5 + 3 = 9. The answer is 9.", "9") == "5 + 3 = 9 is not true"
    assert fault("5 + 3 = 8. The answer is 7.", "8") == "it states the answer 7, not 8"
    assert fault("Nothing to see", "8") == "it states no answer"
    assert fault("2 + 3 * 4 = 14 and $1.50 * 2 = $3. The answer is 3.", "3") is None
    assert fault("12 eggs * 2 - 4 = 20. (8 - 2) / 3 = 2. The answer is 2.", "2") is None  # begun by words or brackets: not checked


def test_nothing_that_is_asked_was_trained_on():
    found = split(Procedural(seed=1), problems=300, test=80, validation=40, share=0.25, seed=1)
    assert [len(x) for x in (found.rungs, found.validation, found.unseen_instances, found.unseen_templates)] == [300, 40, 80, 80]
    trained = {p.question for r in found.rungs for p in (r.problem, r.similar)}
    asked = [p.question for part in (found.validation, found.unseen_instances, found.unseen_templates) for p in part]
    assert len(trained) == 600 and len(set(asked)) == 200 and not trained & set(asked)
    kept, new = {r.problem.template for r in found.rungs}, {p.template for p in found.unseen_templates}
    assert not kept & new and {p.template for p in found.unseen_instances} == kept
    assert {t.partition("/")[0] for t in new} <= {t.partition("/")[0] for t in kept}, "a structure without a story to learn it from"
    assert all(r.problem.template == r.similar.template for r in found.rungs)
    assert len(held_out(["a", "b", "c", "d"], share=0.5, seed=0)) == 2 and held_out(["a", "b"], share=0, seed=0) == set()


def labelled(tmp_path, count=12):
    lines = [
        {"q": f"What is {n} plus 1?", "answer": f"We add <<{n}+1={n + 1}>>{n} + 1 = {n + 1}\n#### {n + 1}", "type": "abc"[n % 3]}
        for n in range(count)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "in.jsonl"


def test_a_labelled_file(tmp_path):
    source = Labelled(labelled(tmp_path), Fields(question="q", label="type"))
    found = split(source, problems=100, test=4, validation=0, share=0.34, seed=0)
    assert len({p.template for p in found.unseen_templates}) == 1 and len(found.rungs) == 6 and len(found.unseen_instances) == 2
    problem = found.rungs[0].problem
    assert re.fullmatch(r"We add (\d+) \+ 1 = (\d+)\nThe answer is \2\.", problem.solution) and problem.strategy.endswith(
        "Work in 1 steps: add."
    )
    assert all(r.similar.template == r.problem.template and r.similar.question != r.problem.question for r in found.rungs)
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: no solution \(field 'solution'\); --solution-field names another"):
        Labelled(tmp_path / "bad.jsonl")
    assert (
        normalised("So \\boxed{4}.") == ("So \\boxed{4}.", "4")
        and described("a", "x") == "This is a problem of the type a. Work step by step."
    )


def test_rungs_on_disk(tmp_path):
    write_rungs(tmp_path / "r.jsonl", [RUNG, Rung(ONE)])
    assert read_rungs(tmp_path / "r.jsonl") == [RUNG, Rung(ONE)]
    apart = replace(ONE, question="a\u2028b\x85c")
    write_rungs(tmp_path / "r.jsonl", [Rung(apart), RUNG])
    assert read_rungs(tmp_path / "r.jsonl") == [Rung(apart), RUNG]
    (tmp_path / "r.jsonl").write_text('{"question": "a"}')
    with pytest.raises(DataError, match=r"r.jsonl, line 1: no 'answer'"):
        read_rungs(tmp_path / "r.jsonl")


def test_the_verb(tmp_path, capsys):
    words = ["metaladder", "--out", str(tmp_path), "--problems", "40", "--test", "20", "--validation", "8"]
    assert data.main(words) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {row[0].strip("| "): row[1:] for row in table[1:]}
    assert list(rows) == [*(n for n in VARIANTS if "ref" not in n), "metaladder+reverse"] and rows["metaladder+reverse"][1] == "80"
    sizes = {s["variant"]: s for s in json.loads((tmp_path / build.SIZES).read_text())}
    lines = [json.loads(line) for line in (tmp_path / "metaladder.jsonl").read_text().splitlines()]
    assert sizes["metaladder"]["response"] == sum(len(x["response"]) for x in lines) and len(lines) == 40
    assert float(rows["cot"][4]) == pytest.approx(
        (sizes["metaladder+reverse"]["prompt"] + sizes["metaladder+reverse"]["response"])
        / (sizes["cot"]["prompt"] + sizes["cot"]["response"]),
        abs=0.01,
    )
    before = (tmp_path / "rungs.jsonl").read_bytes()
    assert data.main([*words[:3], "--source", "none", "--variants", "cot"]) == 0 and (tmp_path / "rungs.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="--source 'gsm'"):
        data.main([*words, "--source", "gsm"])
    with pytest.raises(DataError, match=r"variant refaug needs .* reflections come from a teacher"):
        data.main([*words, "--variants", "refaug"])


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    from llmtrain.data.metaladder.labelled import Gym

    found = split(Gym(), problems=200, test=40, validation=0, share=0.2, seed=0)
    assert len(found.rungs) > 150 and len({p.template for p in found.unseen_templates}) > 10
    assert not {r.problem.template for r in found.rungs} & {p.template for p in found.unseen_templates}
    assert all(fault(r.problem.solution, r.problem.answer) is None for r in found.rungs)
