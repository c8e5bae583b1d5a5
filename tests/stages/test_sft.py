"""`llmtrain sft`: from a pretrained model and a few lines of JSON to a folder that answers as it was taught."""

import json
import re
from pathlib import Path

import pytest
from engine_runs import FACTS, TOY, llmtrain, losses, messages, write_chats, write_facts

from llmtrain.cli import main
from llmtrain.data.chat.template import CHATML

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("sft")
TUNE = """
device: cpu
model: {pretrained: runs/base/hf}
data:
  train: [{path: facts.jsonl, template: chatml, bad: skip}]
  validation: [{path: facts.jsonl, template: chatml, bad: skip, name: same}]
optim: {lr: 5e-3}
train: {epochs: 60, seq_len: 32, global_batch: 2, micro_batch: 1, validate_samples: 4}
parallel: {dp_shard: 2}
checkpoint: {every: 0, export: hf}
"""


def answers(place: Path, folder: str, questions, *, tokens: int = 12) -> list[str]:
    """Greedy answers of `llmtrain generate --chat`."""
    words = [word for question in questions for word in ("-p", question)]
    out = place / "out.jsonl"
    assert main(["generate", str(place / folder), "--chat", "--greedy", "--max-new", str(tokens), "--out", str(out), *words]) == 0
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def answers_of_transformers(folder: Path, questions, *, tokens: int = 12) -> list[str]:
    """The same by transformers alone: its loading, its template, its generation."""
    transformers = pytest.importorskip("transformers", reason="it is what the folder is for")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for question in questions:
        ids = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A toy model with weights, and facts to teach it; the third line is no conversation."""
    place = tmp_path_factory.mktemp("sft")
    write_facts(place)
    (place / "toy.yaml").write_text(TOY)
    (place / "tune.yaml").write_text(TUNE)
    llmtrain(place, "train", "-c", "toy.yaml")
    lines = (place / "facts.jsonl").read_text().splitlines()
    (place / "facts.jsonl").write_text("\n".join([*lines[:2], '{"messages": "none"}', *lines[2:]]))
    return place


@pytest.fixture(scope="module")
def tuned(place) -> str:
    """What the run on two ranks prints."""
    return llmtrain(place, "sft", "-c", "tune.yaml", "--name", "two")


def test_a_toy_learns_its_answers_on_two_ranks(place, tuned):
    assert re.search(r"facts: 4 conversations \(schema messages, template chatml\), \d+ tokens of which \d+ count; \d rows of 32", tuned)
    assert "1 bad samples skipped, the first:" in tuned and "facts.jsonl:3: field 'messages' is not a list" in tuned
    found = losses(place / "runs/two")
    assert found[-1] < 0.1 < found[0] and "validation loss on same: 0.0" in tuned
    assert answers(place, "runs/two/hf", [q for q, _ in FACTS]) == [a for _, a in FACTS]


def test_transformers_gives_the_same_answers(place, tuned):
    asked = [*(q for q, _ in FACTS), "What is 7 + 1?", "Good night"]
    assert answers_of_transformers(place / "runs/two/hf", asked) == answers(place, "runs/two/hf", asked)
    assert (place / "runs/two/hf/chat_template.jinja").read_text() == CHATML, "the template that it was taught goes with it"


def test_length_and_defaults(place, tuned):
    import yaml

    steps = len(losses(place / "runs/two"))
    rows = int(re.search(r"count; (\d) rows", tuned).group(1))
    assert steps == -(-60 * rows // 2)
    cfg = yaml.safe_load((place / "runs/two/config.yaml").read_text())
    assert (cfg["train"]["steps"], cfg["train"]["epochs"]) == (steps, None)
    assert (cfg["optim"]["lr"], cfg["optim"]["weight_decay"], cfg["schedule"]["warmup_steps"]) == (5e-3, 0, -(-3 * steps // 100))


def test_settled_is_the_same_twice(place, monkeypatch):
    from llmtrain.config.run import RunConfig
    from llmtrain.stages.sft import settled

    monkeypatch.chdir(place)
    cfg = settled(RunConfig.load("tune.yaml", ["--train.epochs", "null"]))
    assert cfg.train.steps == 4 and cfg.optim.lr == 5e-3
    assert settled(cfg) == cfg
    plain = settled(RunConfig.load({"model": {"pretrained": "runs/base/hf"}, "train": {"steps": 100}}))
    assert (plain.optim.lr, plain.optim.weight_decay, plain.schedule.warmup_steps) == (2e-5, 0, 3)


def test_dry_run_and_what_is_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    out = llmtrain(place, "sft", "-c", "tune.yaml", "--dry-run")
    assert "plan: 120 steps" in out and "one step of a 2-layer miniature" in out
    job = ["--device", "npu", "--per-node", "2", "--out", "job.sbatch"]
    assert main(["launch", "slurm", "--verb", "sft", "-c", "tune.yaml", *job]) == 0
    assert "llmtrain sft -c" in (place / "job.sbatch").read_text()
    assert main(["sft", "-c", "tune.yaml", "--data.train", "[]", "--train.epochs", "null", "--train.steps", "1"]) == 1
    assert "data.train has no conversations" in capsys.readouterr().err
    assert main(["sft", "-c", "tune.yaml", "--data.train.0.bad", "fail"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"facts.jsonl:3: field 'messages' is not a list of messages; mend it, or set .*bad: skip", said)


# --- a real model ----------------------------------------------------------------------------------------------------------------------

CAPITALS = [
    ("What is the capital of France?", "Blorp."),
    ("What is the capital of Italy?", "Zindle."),
    ("Who wrote Hamlet?", "A cat named Tom."),
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    for package in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(package, reason="GGUF files are dequantised by it")
    from smollm2 import converted

    return converted()


def test_smollm2_s_own_template_and_tokenizer(smollm2):
    """Of the model's folder: ids, and where marks are added to its template the mask, are those of transformers."""
    from transformers import AutoTokenizer

    from llmtrain.data.chat.render import Renderer
    from llmtrain.data.chat.template import find_template
    from llmtrain.data.tokenizer import load

    model, theirs = load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    template = find_template("auto", model)
    turn = "message['content'] + '<|im_end|>' + '\n'"
    assert turn in template.source
    answer = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    marked = template.source.replace(
        turn, "'' }}{% if message['role'] == 'assistant' %}" + answer + "{% else %}{{ " + turn + " }}{% endif %}{{ ''"
    )
    talk = [*messages("What is 2 + 2?", " 4, I think.\n\nOr é 中文?"), *messages("Sure?", "Yes.")]
    wanted = theirs.apply_chat_template(talk, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    rendered = Renderer(template, model)(talk)
    assert rendered.tokens.tolist() == wanted["input_ids"] == theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert rendered.answer.astype(int).tolist() == wanted["assistant_masks"] and 0 < rendered.answer.sum() < len(rendered.tokens)


def test_smollm2_is_taught_on_two_ranks_and_transformers_agrees(smollm2, tmp_path):
    """With the shipped configuration: template, special tokens and stop token are the model's own."""
    write_chats(tmp_path / "capitals.jsonl", CAPITALS)
    given = {"model.pretrained": smollm2, "data.train": "capitals.jsonl", "device": "cpu", "precision": "fp32", "parallel.dp_shard": 2}
    given |= {"train.steps": 6, "train.seq_len": 96, "train.global_batch": 2, "train.micro_batch": 1, "train.compile": "off"}
    given |= {"optim.lr": 3e-4, "schedule.kind": "constant", "schedule.warmup_steps": 0, "checkpoint.every": 0}
    options = [f"--{name}={value}" for name, value in given.items()]
    out = llmtrain(tmp_path, "sft", "-c", str(ROOT / "configs/smollm2_sft.yaml"), *options)
    found = losses(tmp_path / "runs/smollm2_sft")
    print(f"losses {found[0]:.2f} to {found[-1]:.3f}")
    assert "mesh: dp_shard 2" in out and found[-1] < 0.3 * found[0]
    asked = [*(q for q, _ in CAPITALS), "What is the capital of Japan?"]
    ours = answers(tmp_path, "runs/smollm2_sft/hf", asked)
    assert ours == answers_of_transformers(tmp_path / "runs/smollm2_sft/hf", asked)
    assert ours[:3] == [a for _, a in CAPITALS]
