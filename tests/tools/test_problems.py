"""Problems asked of a model whose every answer is known: plain, and by the shortcut; scored by template."""

import json
import math

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.data.metaladder.problem import Problem, Rung, write_problems
from llmtrain.data.metaladder.render import prompt, response
from llmtrain.errors import UserError
from llmtrain.model.decode import UncachedRunner
from llmtrain.tools import evaluate, problems
from llmtrain.tools.completions import capacity_for, slots_for
from llmtrain.tools.open_model import OpenModel

CFG = ModelConfig.model_validate({"vocab_size": 256, "layers": 1, "hidden": 32, "max_seq_len": 2048, "attention": {"heads": 2}})
LADDER = [
    Rung(
        Problem(
            f"p{n}", "a" if n < 4 else "b", f"What is {n} and 2?", f"{n} + 2 = {n + 2}. The answer is {n + 2}.", str(n + 2), "Add them."
        ),
        Problem(f"s{n}", "a", f"What is {n} and 5?", f"{n} + 5 = {n + 5}. The answer is {n + 5}.", str(n + 5), "Add them."),
    )
    for n in range(6)
]
ASKED = [rung.problem for rung in LADDER]


class Bytes:
    """A tokenizer of bytes; 0 ends a document, 1 a sequence."""

    eod_id, eos_id, bos_id = 0, 1, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.fixture
def scripted(monkeypatch):
    """A model that continues every prompt with the text it was given for it; `seen` are the longest texts it was fed."""

    def make(texts: list[str]) -> tuple[OpenModel, list[str]]:
        seen: list[str] = []

        def one_row(tokens):
            rows = tokens.tolist()
            seen.extend(bytes(row).rstrip(b"\0").decode() for row in rows)
            out = torch.zeros(*tokens.shape, 256)
            for number, row in enumerate(rows):
                end = len(bytes(row).rstrip(b"\0"))
                out[number, end - 1] = _after(row[:end], texts)
            return out

        def runner(opened, requests, *, batch=8):
            return UncachedRunner(one_row, slots=slots_for(requests, batch), capacity=capacity_for(requests))

        monkeypatch.setattr(problems, "runner_for", runner)
        return OpenModel(torch.nn.Linear(1, 1), CFG, Bytes(), (0,)), seen

    return make


def _after(row: list[int], texts: list[str]) -> torch.Tensor:
    known = [t.encode() for t in texts if t.encode().startswith(bytes(row))]
    found = torch.zeros(256)
    found[known[0][len(row)] if known and len(known[0]) > len(row) else 1] = 1.0
    return found


def script(variant: str) -> list[str]:
    return [prompt(rung.problem.question) + response(rung, variant) for rung in LADDER]


@pytest.mark.parametrize("variant", ["cot", "metaladder", "no_strategy", "no_analogy", "no_restate", "post"])
def test_plain_answers_of_every_variant(scripted, variant):
    opened, _ = scripted(script(variant))
    answers = problems.solve(opened, ASKED, batch=4)
    assert [(a.answer, a.correct, a.finished) for a in answers] == [(str(n + 2), True, "stop") for n in range(6)]
    assert [a.text for a in answers] == [response(rung, variant) for rung in LADDER]
    assert [a.tokens for a in answers] == [len(response(rung, variant)) for rung in LADDER]


def test_the_shortcut_restates_in_place_of_the_similar_problem(scripted):
    texts = script("metaladder") + [prompt(r.problem.question) + response(r, "no_analogy") for r in LADDER]
    opened, seen = scripted(texts)
    answers = problems.solve(opened, ASKED, inference="shortcut", batch=4)
    assert all(a.correct for a in answers)
    assert [a.text for a in answers] == [response(rung, "no_analogy") for rung in LADDER]
    begun = prompt(ASKED[3].question) + "Add them.\n\nOriginal Problem:\n" + ASKED[3].question
    assert begun in seen, "the second pass begins after the restated problem"
    stop = prompt(ASKED[3].question) + "Add them.\n\nSimilar Problem"
    assert stop in seen and not any(text.startswith(stop + ":\n") for text in seen), "the first pass ends at the header"
    solved = "\n\nSolution to the Original Problem:\n" + ASKED[0].solution
    assert answers[0].tokens == len("Add them.\n\nSimilar Problem:") + len(solved)
    plain = problems.solve(opened, ASKED, batch=4)
    assert answers[0].tokens < plain[0].tokens


def test_what_a_similar_problem_is_answered_is_no_answer():
    whole = response(LADDER[0], "metaladder")

    def part(text):
        return problems.solution_part(text, ASKED[0].question)

    assert part(whole) == ASKED[0].solution
    assert part(whole.partition("\n\nOriginal Problem:")[0]) is None, "broken off after the analogue's solution"
    assert part(whole.partition("\n\nSolution to the Similar")[0]) is None
    assert part(response(LADDER[0], "post")) == ASKED[0].solution + "\n\nAdd them."
    assert part(ASKED[0].solution) == ASKED[0].solution
    assert part(whole.partition("\n\nSolution to the Original")[0]) is None, "a number of the question is no answer"
    assert part(f"Add them.\n\nOriginal Problem:\n{ASKED[0].question}\n2. The answer is 2.") == "2. The answer is 2."
    assert part("Add them.\n\nOriginal Problem:\nWhat is 7 and") is None


def test_stops_limits_and_wrong_answers(scripted):
    texts = [
        prompt(ASKED[0].question) + "The answer is 2.\n\nExplanation: The answer is 9.",
        prompt(ASKED[1].question) + "The answer is 33.",
    ]
    opened, _ = scripted(texts)
    first, second = problems.solve(opened, ASKED[:2])
    assert (first.text, first.correct, second.answer, second.correct) == ("The answer is 2.", True, "33", False)
    cut = problems.solve(opened, ASKED[:1], max_new=5)[0]
    assert (cut.finished, cut.tokens, cut.correct) == ("length", 5, False)
    with pytest.raises(UserError, match="--inference 'fast'"):
        problems.solve(opened, ASKED, inference="fast")
    assert problems.solve(opened, []) == []
    short = opened._replace(cfg=CFG.model_copy(update={"max_seq_len": 20}))
    with pytest.raises(UserError, match="a problem fills the model"):
        problems.solve(short, ASKED)


def test_the_verb(scripted, tmp_path, monkeypatch, capsys):
    texts = script("cot")
    texts[1] = prompt(ASKED[1].question) + "The answer is 4."
    opened, _ = scripted(texts)
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: opened)
    write_problems(tmp_path / "asked.jsonl", ASKED)
    assert evaluate.main(["x", "problems", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out.json")]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[2:]] == [
        ["| a", "4", "75.0%", "21.7%"],
        ["| b", "2", "100.0%", "0.0%"],
        ["| all", "6", "83.3%", "15.2%"],
    ]
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found["scores"][0]["error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert [a["correct"] for a in found["answers"]] == [True, False, True, True, True, True]
    assert found["answers"][0]["seconds"] > 0 and found["inference"] == "plain"
    with pytest.raises(UserError, match="--batch 0"):
        evaluate.main(["x", "problems", str(tmp_path / "asked.jsonl"), "--batch", "0"])
