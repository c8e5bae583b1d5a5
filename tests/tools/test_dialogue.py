"""Dialogue F1: known scores, prompts, batches that do not change answers, the verb; comparing two results item by item."""

import json
import math

import numpy as np
import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.model import build, initialise
from llmtrain.model.sampling import Sampling
from llmtrain.ops import Call, resolve
from llmtrain.tools import dialogue, evaluate, paired
from llmtrain.tools.completions import Request, complete, runner_for
from llmtrain.tools.open_model import OpenModel

torch.set_num_threads(1)
CFG = ModelConfig.model_validate(
    {"vocab_size": 256, "layers": 2, "hidden": 32, "max_seq_len": 96, "attention": {"heads": 2}, "init": {"std": 0.3}}
)


class Letters:
    """A tokenizer of bytes that shows all of them as letters, spaces or line ends; 7 ends a text."""

    eod_id, bos_id = 7, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens) -> str:
        return "".join("\n" if t % 23 == 0 else " " if t % 4 == 0 else "abc"[t % 3] for t in tokens)


@pytest.fixture(scope="module")
def opened():
    with torch.device("meta"):
        model = build(CFG, resolve({}, Call(device="cpu", dtype=torch.float64, head_dim=16)), 16)
    model = model.double().to_empty(device="cpu").eval()
    initialise(model, CFG, 5)
    return OpenModel(model, CFG, Letters(), (7,))


@pytest.fixture
def file(tmp_path):
    rows = [{"turns": [f"Say {'b ' * n}", "why?"][: 1 + n % 2], "response": "a b c"} for n in range(11)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The cat sat.", "a cat SAT", 1.0),  # articles, case and punctuation do not count
        ("cat cat dog", "cat bird", 0.4),  # 1 in common of 3 and of 2
        ("don't", "dont", 1.0),
        ("", "cat", 0.0),
        ("fish", "cat", 0.0),
    ],
)
def test_unigram_f1(answer, reference, f1):
    assert dialogue.unigram_f1(answer, reference) == pytest.approx(f1)


def test_prompts_alternate_and_end_with_who_speaks_next():
    assert dialogue.prompt(["Hi\nthere"]) == "User 1: Hi there\nUser 2:"
    assert dialogue.prompt(["a", "b"]) == "User 1: a\nUser 2: b\nUser 1:"


def test_answers_are_the_greedy_continuations_up_to_a_line_end(opened, file):
    dialogues = dialogue.read(file)
    found = dialogue.evaluate(opened, dialogues, max_new=20, batch=4)
    prompts = [opened.encode(dialogue.prompt(d.turns)) for d in dialogues]
    rule = Sampling(max_new=20, temperature=0.0, stop_ids=(7,))
    alone = [complete(runner_for(opened, [r]), opened.tokenizer, [r])[0].text for r in (Request(p, rule, ("\n",)) for p in prompts)]
    texts = [found[index].text for index in range(11)]
    assert texts == [text.strip() for text in alone] and len(set(texts)) > 3
    assert min(map(len, texts)) < 19, "some answers end before their longest length"
    parts = [dialogue.evaluate(opened, dialogues, max_new=20, batch=4, mine=lambda n, r=rank: n % 2 == r) for rank in range(2)]
    assert parts[0] | parts[1] == found and not parts[0].keys() & parts[1].keys(), "ranks share whole batches"


def test_a_long_dialogue_keeps_its_end(opened):
    long = [dialogue.Dialogue(("b" * 500,), "a")]
    assert dialogue.evaluate(opened, long, max_new=8)[0] == dialogue.evaluate(opened, [dialogue.Dialogue(("b" * 900,), "a")], max_new=8)[0]


def test_the_verb_and_the_comparison(opened, file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: opened)
    outs = [tmp_path / f"{name}.json" for name in "ab"]
    for out, length in zip(outs, ("12", "3")):
        assert evaluate.main(["x", "dialogue", str(file), "--max-new", length, "--batch", "3", "--out", str(out)]) == 0
    first, second = (json.loads(out.read_text())["results"] for out in outs)
    scores = [item["f1"] for item in first["items"]]
    assert first["dialogues"] == 11 and first["f1"] == pytest.approx(np.mean(scores))
    assert first["f1_stderr"] == pytest.approx(np.std(scores, ddof=1) / math.sqrt(11))
    assert f"{first['f1']:.2f}" in capsys.readouterr().out
    assert evaluate.main(["compare", *map(str, outs), "--out", str(tmp_path / "c.json")]) == 0
    result = json.loads((tmp_path / "c.json").read_text())["results"]["dialogue f1"]
    assert result["mean"] == pytest.approx(second["f1"] - first["f1"]) and result["items"] == 11
    assert result["low"] <= result["mean"] <= result["high"] and "dialogue f1 | 11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not a JSON object"),
        ('{"turns": ["a"]}', "line 1: not a JSON object with `turns` and `response`"),
        ('{"turns": [], "response": "a"}', "`turns` is a list of at least one text"),
        ('{"turns": ["a"], "response": "The."}', "has no word to compare"),
        ("", "holds no dialogue"),
    ],
)
def test_files_that_hold_no_dialogues(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        dialogue.read(tmp_path / "d.jsonl")


def test_results_of_other_items_are_not_compared(tmp_path):
    def write(name, scores, kind="dialogue"):
        results = {"items": [{"f1": score} for score in scores]}
        (tmp_path / name).write_text(json.dumps({"evaluation": kind, "results": results}))
        return tmp_path / name

    a, b = write("a.json", [1, 2, 3]), write("b.json", [1, 2])
    with pytest.raises(UserError, match=r"3 items in .*, 2 in .*; they must be the same items"):
        paired.compare(a, b)
    with pytest.raises(UserError, match="has no scores per item"):
        paired.compare(a, write("c.json", [1], kind="perplexity"))
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(UserError, match="not a file that"):
        paired.compare(a, tmp_path / "d.json")


def test_the_bootstrap_knows_textbook_errors():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 2.0, size=400)
    found = paired.bootstrap(values)
    assert found.mean == pytest.approx(values.mean()) and found.error == pytest.approx(values.std() / 20, rel=0.08)
    assert found.detectable == pytest.approx(2.8 * found.error)
    common = rng.normal(0, 1, size=(1, 100)) + np.zeros((25, 1))  # what items have in common does not average out over runs
    assert paired.bootstrap(common).error == pytest.approx(common[0].std() / 10, rel=0.15)
    assert paired.bootstrap_between(common, 0 * common).error == pytest.approx(common[0].std() / 10, rel=0.15)
    between = paired.bootstrap_between(common + 0.5, common)
    assert between.mean == pytest.approx(0.5) and between.error < 1e-12, "items are drawn alike on both sides"
