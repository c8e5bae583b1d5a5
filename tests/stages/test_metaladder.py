"""The stage's rounds: examples, lengths, answers added, what a second start does again, on one rank and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.config.run import RunConfig
from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.build import rungs_of
from llmtrain.data.metaladder.render import examples
from llmtrain.data.tokenizer import load
from llmtrain.errors import UserError
from llmtrain.stages import metaladder, metaladder_answers
from llmtrain.tools import data
from llmtrain.tools.problems import Answered

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data and a tokenizer of bytes and their pairs."""
    place = tmp_path_factory.mktemp("ladder")
    assert (
        data.main(["metaladder", "--out", str(place / "data"), "--problems", "40", "--test", "8", "--validation", "6", "--largest", "12"])
        == 0
    )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [line["prompt"] + line["response"] for line in examples(rungs_of(place / "data"), "metaladder")]
    library.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False))
    library.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return place


def config(place: Path, name: str, **options) -> RunConfig:
    values = {
        "name": name,
        "output": str(place / "runs"),
        "device": "cpu",
        "tokenizer.path": str(place / "tokenizer.json"),
        "model.layers": 1,
        "model.hidden": 32,
        "model.max_seq_len": 512,
        "model.attention.heads": 2,
        "model.ffn.hidden": 48,
        "train.seq_len": 256,
        "train.global_batch": 8,
        "train.compile": "off",
        "metrics.sample_tokens": 4,
        "data.cache": str(place / "cache"),
        "metaladder.data": str(place / "data"),
        "metaladder.max_new": 24,
        "metaladder.sets": ["validation"],
    }
    return RunConfig.load(None, values | {key.replace("__", "."): value for key, value in options.items()})


def results(cfg: RunConfig) -> list[dict]:
    return json.loads((Path(cfg.output) / cfg.name / "results.json").read_text())


def test_a_run_and_the_same_again(place):
    cfg = config(place, "one", metaladder__inference=["plain", "shortcut"], metaladder__epochs=2)
    assert metaladder.preflight(cfg) == 1 and metaladder.run(cfg) == 0
    [found] = results(cfg)
    folder = Path(cfg.output) / "one"
    assert (found["examples"], found["round"]) == (40, 0) and found["steps"] >= 1
    assert {how: s["count"] for how, s in found["answers"]["validation"].items()} == {"plain": 6, "shortcut": 6}
    assert list(found["answers"]) == ["validation"]
    losses = [json.loads(line) for line in (folder / "round-0/metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in losses) == found["steps"]
    answers = json.loads((folder / "answers/round-0-validation-shortcut.json").read_text())["answers"]
    assert all("\n\nOriginal Problem:\n" in a["text"] and a["seconds"] > 0 for a in answers)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*") if "answers" in str(path) or "checkpoints" in str(path)}
    assert metaladder.run(cfg) == 0 and {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(DataError, match="was begun with other training examples"):
        metaladder.run(config(place, "one", metaladder__variant="cot"))


def test_a_model_of_ones_own_as_the_teacher(place):
    from llmtrain import generate
    from llmtrain.tools.local_teacher import local_teacher

    cfg = config(place, "teacher", train__steps=1)
    assert metaladder.run(cfg) == 0
    folder = place / "runs/teacher/round-0"
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    messages = [{"role": "system", "content": "Teach."}, {"role": "user", "content": "What is 1 and 2?"}]
    answer = local_teacher(str(folder), device="cpu")({"messages": messages, "max_tokens": 6, "temperature": 0.0, "seed": 0})
    assert answer == generate(folder, "system: Teach.\n\nuser: What is 1 and 2?\n\n", max_new=6, temperature=0.0) and answer
    long = [{"role": "user", "content": "7 " * 600}]
    with pytest.raises(UserError, match="is too short for a request of"):
        local_teacher(str(folder), device="cpu")({"messages": long, "max_tokens": 6, "temperature": 0.0, "seed": 0})


@pytest.fixture
def scripted(monkeypatch):
    """Answers without a model: the problem's own solution for even ids, else something wrong; the names of the models asked."""
    asked = []

    def solve(self, problems, inference):
        asked.append((self._number, len(problems)))
        right = [int(p.id.rpartition("/")[2]) % 2 == 0 for p in problems]
        texts = [f"In round {self._number}: {p.solution}" if ok else "The answer is 0." for p, ok in zip(problems, right)]
        return [Answered(p.id, p.template, p.answer, "", ok, t, "stop", 3, 0.1) for p, ok, t in zip(problems, right, texts)]

    monkeypatch.setattr(metaladder_answers.Asker, "_solve", solve)
    return asked


def test_rounds_add_right_answers_and_train_the_base_model_anew(place, scripted):
    cfg, trained = config(place, "rounds", metaladder__rounds=2), []

    def train(of_round):
        trained.append(of_round)
        return 0

    assert metaladder.run(cfg, train=train) == 0
    rungs = rungs_of(place / "data")
    even = [r.problem for r in rungs if int(r.problem.id.rpartition("/")[2]) % 2 == 0]
    found = results(cfg)
    assert [f["examples"] for f in found] == [40, 40 + len(even), 40 + 2 * len(even)] and 0 < len(even) < 40
    assert [f.get("added") for f in found] == [len(even), len(even), None]
    assert [c.name for c in trained] == ["round-0", "round-1", "round-2"] and all(c.model.pretrained is None for c in trained)
    lines = [json.loads(line) for line in (Path(cfg.output) / "rounds/round-2.jsonl").read_text().splitlines()]
    assert lines[:40] == list(examples(rungs, "metaladder"))
    assert sorted(x["id"] for x in lines[40 : 40 + len(even)]) == sorted(f"evolved-0-{p.id}" for p in even)
    assert all(x["response"].startswith("In round 1: ") for x in lines[40 + len(even) :])
    steps = [c.train.steps for c in trained]
    assert steps == sorted(steps) and steps[0] < steps[2], "more examples, as many passes"
    assert scripted == [(0, 6), (0, 40), (1, 6), (1, 40), (2, 6)]
    assert metaladder.run(cfg, train=train) == 0 and len(scripted) == 5, "answers are kept"


def test_a_round_that_ends_badly_ends_the_stage(place, scripted):
    codes = [0, 2]
    assert metaladder.run(config(place, "stopped", metaladder__rounds=2), train=lambda cfg: codes.pop(0)) == 2
    assert not codes and not (place / "runs/stopped/results.json").exists()


def test_reverse_asks_the_similar_problems_too(place, scripted):
    cfg = config(place, "reverse", metaladder__variant="metaladder+reverse", metaladder__rounds=1)
    assert metaladder.run(cfg, train=lambda cfg: 0) == 0
    assert results(cfg)[0]["examples"] == 80 and scripted[1] == (0, 80)


def test_equal_tokens(place):
    cfg = config(place, "tokens", metaladder__variant="cot", metaladder__tokens_of="metaladder")
    rungs = rungs_of(place / "data")
    encode = load(place / "tokenizer.json").encode
    sizes = {name: sum(len(encode(x["prompt"] + x["response"])) + 1 for x in examples(rungs, name)) for name in ("cot", "metaladder")}
    ratio = metaladder.token_ratio(cfg, rungs)
    assert ratio == pytest.approx(sizes["metaladder"] / sizes["cot"]) and ratio > 1.5
    for name in ("tokens", "plain"):
        metaladder.keep_examples(place / f"runs/{name}/round-0.jsonl", list(examples(rungs, "cot")))
    alone = metaladder.round_config(config(place, "plain", metaladder__variant="cot", metaladder__epochs=4), 0, rungs).train.steps
    equal = metaladder.round_config(cfg.model_copy(update={"metaladder": cfg.metaladder.model_copy(update={"epochs": 4.0})}), 0, rungs)
    assert equal.train.steps == pytest.approx(alone * ratio, abs=0.5 * ratio + 0.5), "both are rounded to whole steps"
    fixed = metaladder.round_config(config(place, "plain", metaladder__variant="cot", train__steps=7), 0, rungs)
    assert fixed.train.steps == 7, "a length that is given counts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metaladder__data": None}, "metaladder.data is not set"),
        ({"metaladder__data": "nowhere"}, "nowhere: no rungs.jsonl"),
        ({"metaladder__variant": "cott"}, "variant 'cott': allowed are cot"),
        ({"metaladder__variant": "refaug"}, "reflections come from a teacher"),
        ({"tokenizer__path": None}, "set tokenizer.path"),
        ({"metaladder__sets": []}, "has none of them"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(place, options, message):
    with pytest.raises(UserError, match=message):
        metaladder.preflight(config(place, "wrong", **options))


def test_two_ranks_share_the_answers(place):
    """The verb in real processes, two rounds: every rank answers a half of the problems, and both train on all of it."""
    from llmtrain.config.load import to_yaml

    cfg = config(place, "two", parallel__dp_shard=2, metaladder__rounds=1, train__steps=2, metaladder__max_new=6)
    (place / "two.yaml").write_text(to_yaml(cfg))
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(place), *sys.path]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "llmtrain", "metaladder", "-c", "two.yaml"]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [f["answers"]["validation"]["plain"]["count"] for f in results(cfg)] == [6, 6] and "| round | examples |" in done.stdout
    answers = json.loads((place / "runs/two/answers/round-0-train-plain.json").read_text())["answers"]
    assert [a["id"] for a in answers] == [r.problem.id for r in rungs_of(place / "data")]
    assert not list((place / "runs/two/answers").glob("*-of-2*"))
