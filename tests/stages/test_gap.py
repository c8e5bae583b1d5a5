"""`llmtrain gap`: the paper's loop, many texts from the same weights, stops and resumes, on one rank and on several."""

import json
import math

import numpy as np
import pytest
import torch
from worlds import run_world

from llmtrain.config.errors import ConfigError
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET
from llmtrain.data.tokenizer import load
from llmtrain.errors import UserError
from llmtrain.model.objective import ascent, cross_entropy
from llmtrain.stages import gap
from llmtrain.stages.gap_texts import OneText, gather_texts

pytestmark = pytest.mark.xdist_group("gap")
LINE = "In year {} the king said {} words to the queen, and nobody heard them at all. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A byte-level tokenizer, four texts, dialogues."""
    from tokenizers import ByteLevelBPETokenizer

    place = tmp_path_factory.mktemp("gap")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([LINE.format(n, n * n) for n in range(50)], vocab_size=300, special_tokens=["<|endoftext|>"])
    library.save(str(place / "tokenizer.json"))
    rows = [{"text": LINE.format(n, 7 * n) * (1 + n)} for n in range(4)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "news.txt").write_text("\n\n".join(LINE.format(1000 + n, n) * 2 for n in range(5)))
    dialogues = [{"turns": [f"What did the king say in {n}?"], "response": f"He said {n} words to the queen."} for n in range(6)]
    (place / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    return place


def settings(place, **options) -> dict:
    texts = {"name": "plain", "input": [str(place / "texts.jsonl")]}
    perplexity = {"texts": [str(place / "news.txt")], "tokens": 16}
    measured = {"perplexity": perplexity, "dialogue": {"file": str(place / "d.jsonl"), "max_new": 4, "batch": 4}}
    values = {"texts": [texts], "evaluate_at": [2, 4], **measured} | options
    return {"tokenizer": {"path": str(place / "tokenizer.json")}, "train": {"seq_len": 32, "steps": 4, "loss_chunk": 16}, "gap": values}


# --- what is run ----------------------------------------------------------------------------------------------------------------------


def test_the_papers_settings_are_the_defaults_and_the_configuration_wins(place):
    cfg = gap.settled(RunConfig.model_validate({"device": "cpu", "tokenizer": {"path": str(place / "tokenizer.json")}}))
    o, t = cfg.optim, cfg.train
    assert (o.lr, o.betas, o.eps, o.weight_decay, o.max_grad_norm) == (5e-5, (0.9, 0.98), 1e-8, 0.0, None)
    assert (t.steps, t.seq_len, t.global_batch, t.micro_batch, cfg.schedule.kind) == (15, 512, 1, 1, "constant")
    assert cfg.gap.evaluate_at == [0, 5, 10, 15] and cfg.model.vocab_size == 300
    assert gap.settled(cfg) == cfg
    given = {"optim": {"lr": 1e-3, "max_grad_norm": 1.0}, "train": {"steps": 3, "seq_len": 64}, "parallel": {"dp_shard": 2}}
    cfg = gap.settled(RunConfig.model_validate({"device": "cpu", "model": {"vocab_size": 9}} | given))
    assert (cfg.optim.lr, cfg.optim.betas, cfg.optim.max_grad_norm) == (1e-3, (0.9, 0.98), 1.0)
    assert (cfg.train.steps, cfg.train.seq_len, cfg.train.global_batch) == (3, 64, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"tokens": 9}}, r"train\.tokens"),
        ({"train": {"global_batch": 8}}, "train.global_batch 8"),
    ],
)
def test_what_a_run_on_one_text_cannot_have(changes, message):
    with pytest.raises(UserError, match=message):
        gap.settled(RunConfig.model_validate({"device": "cpu", "model": {"vocab_size": 9}} | changes))


def test_what_is_wrong_is_said_before_any_rank_starts(place):
    def check(**options):
        gap.preflight(RunConfig.model_validate({"device": "cpu"} | settings(place, **options)))

    with pytest.raises(UserError, match=r"step 9 is beyond train\.steps 4"):
        check(evaluate_at=[9])
    with pytest.raises(UserError, match="nothing is measured"):
        check(perplexity={}, dialogue={})
    with pytest.raises(UserError, match=r"gap.select 'x' is not measured; allowed are dialogue f1, nats news"):
        check(select="x")
    with pytest.raises(UserError, match="3 of 4 texts have at least 30 tokens, 4 are wanted"):
        check(texts=[{"input": str(place / "texts.jsonl"), "min_tokens": 30, "count": 4}])
    with pytest.raises(UserError, match="names no text"):
        check(texts=[])
    with pytest.raises(ConfigError, match=r"gap.control 'y' is none of gap.texts: plain"):
        RunConfig.load(settings(place, control="y"))


def test_a_text_keeps_its_end_and_others_of_the_step_have_no_target(place):
    cfg = gap.settled(RunConfig.model_validate({"device": "cpu"} | settings(place)))
    tokenizer = load(place / "tokenizer.json")
    texts = gather_texts(cfg, tokenizer)
    whole = tokenizer.encode(LINE.format(3, 21) * 4)
    assert len(texts) == 4 and len(whole) > 32 and list(texts[3].tokens) == whole[-32:]
    short = gather_texts(cfg.model_copy(update={"train": cfg.train.model_copy(update={"seq_len": 512})}), tokenizer)[0]
    batch = OneText(short.tokens, seq_len=40, batch=2).batch(0, 4)
    n = len(short.tokens)
    assert batch.tokens[0, :n].tolist() == list(short.tokens) and batch.documents == ((n, 40 - n),) * 4
    assert batch.targets[0, : n - 1].tolist() == list(short.tokens[1:]) and (batch.targets[0, n - 1 :] == NO_TARGET).all()
    assert (batch.targets[[1, 3]] == NO_TARGET).all() and torch.equal(batch.targets[2], batch.targets[0])
    assert batch.target_count == 2 * (n - 1)


def test_the_objective_is_minus_the_cross_entropy():
    outputs = {"ce_sum": torch.tensor(3.0), "mtp_ce_sum": torch.tensor(2.0), "mtp_weight": 0.5}
    assert ascent(outputs) == -4.0 == -cross_entropy(outputs)


# --- sweeps ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory):
    """All that one rank does, in one world: by name the result of each sweep."""
    folder = tmp_path_factory.mktemp("one")
    whole = settings(place)
    last = settings(place, texts=[{"name": "plain", "input": [str(place / "texts.jsonl")], "min_tokens": 80}])
    bounded = settings(place, max_rise=1e-9, evaluate_at=[4])
    early = settings(place, early_stop=True, evaluate_at=[1, 5, 6, 7, 8], dialogue={}) | {"train": {"seq_len": 32, "steps": 8}}
    cases = {
        "whole": (str(folder / "whole"), whole, None),
        "last": (str(folder / "last"), last, None),
        "stopped": (str(folder / "resumed"), whole, 6),
        "resumed": (str(folder / "resumed"), whole, None),
        "bounded": (str(folder / "bounded"), bounded, None),
        "early": (str(folder / "early"), early | {"optim": {"lr": 1e-3}}, None),
    }
    made = run_world("gap_world:sweeps", 1, args={"cases": list(cases.values())}, folder=folder)
    return dict(zip(cases, made)) | {"folder": folder, "settings": whole}


def runs(found: dict) -> list[dict]:
    return [line for line in found["lines"] if line["kind"] == "run"]


def test_losses_are_those_of_the_papers_loop_in_plain_pytorch(place, straight, tmp_path):
    args = {"folder": str(tmp_path / "hand"), "values": straight["settings"], "steps": 4}
    curves = run_world("gap_world:by_hand", 1, args=args, folder=tmp_path)
    made = runs(straight["whole"])
    assert len(curves) == len(made) == 4
    worst = max(abs(a - b) / b for run, curve in zip(made, curves) for a, b in zip(run["losses"], curve, strict=True))
    assert worst < 1e-10
    assert all(run["losses"] == sorted(run["losses"]) and run["losses"][-1] > run["losses"][0] + 1e-4 for run in made), "the loss rises"


def test_every_run_starts_from_the_same_weights_and_no_moments(straight):
    whole, alone = runs(straight["whole"]), runs(straight["last"])
    assert len(alone) == 1 and alone[0]["losses"] == whole[3]["losses"] and alone[0]["steps"] == whole[3]["steps"], "bit for bit"
    before, after = straight["last"]["restored"], straight["whole"]["restored"]
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_results_hold_every_item_at_every_step(straight):
    lines = straight["whole"]["lines"]
    assert [line["kind"] for line in lines] == ["setup", "base", *["run"] * 4]
    names = {"dialogue f1": 6, "nats news": 5}
    assert {name: len(values) for name, values in lines[1]["scores"].items()} == names
    for run in runs(straight["whole"]):
        assert list(run["steps"]) == ["2", "4"] and len(run["losses"]) == 4 and run["ended"] == "done"
        assert {name: len(values) for name, values in run["steps"]["4"].items()} == names
        assert run["steps"]["2"]["nats news"] != run["steps"]["4"]["nats news"] != lines[1]["scores"]["nats news"]


def test_a_sweep_that_was_stopped_goes_on_at_the_text(straight):
    stopped, resumed = straight["stopped"], straight["resumed"]
    assert stopped["code"] == 2 and len(runs(stopped)) == 1, "the second text was under way"
    assert resumed["code"] == 0
    plain = [{key: value for key, value in run.items() if key != "seconds"} for run in runs(resumed)]
    assert plain == [{key: value for key, value in run.items() if key != "seconds"} for run in runs(straight["whole"])]
    assert runs(resumed)[0] == runs(stopped)[0], "not made again"


def test_a_run_beyond_its_bounds_ends_and_the_next_is_untouched(straight):
    bounded, whole = runs(straight["bounded"]), runs(straight["whole"])
    assert all(run["ended"].startswith("diverged: the cross-entropy rose") and not run["steps"] for run in bounded)
    assert [run["losses"] for run in bounded] == [run["losses"][:2] for run in whole]


def test_the_papers_early_stop(straight):
    found = runs(straight["early"])
    stopped = [run for run in found if run["ended"].startswith("early")]
    assert stopped, [run["ended"] for run in found]
    for run in stopped:
        assert list(run["steps"]) == ["1", "5", "6"], "the first strike at step 5, the second ends it"


def test_other_settings_are_refused_and_named(place, straight):
    changed = dict(straight["settings"]) | {"optim": {"lr": 1e-4}}
    case = [(str(straight["folder"] / "whole"), changed, None)]
    with pytest.raises(AssertionError, match=r"made with other settings \(optim was"):
        run_world("gap_world:sweeps", 1, args={"cases": case}, folder=straight["folder"])


def test_the_report_and_the_chosen_weights(place, tmp_path):
    values = settings(place, select="nats news", texts=[{"name": "plain", "input": [str(place / "texts.jsonl")], "count": 2}])
    found = run_world("gap_world:exported", 1, args={"folder": str(tmp_path / "e"), "values": values}, folder=tmp_path)
    assert found["code"] == 0 and {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["files"])
    for text in ("## dialogue f1", "## nats news", "gain, held out", "paper's protocol", "| plain | 2 | 2 | 0 | 0 |"):
        assert text in found["report"]


MESHES = {"tp": {"tp": 2}, "cp": {"cp": 2}, "pp": {"pp": 2}, "dp_shard": {"dp_shard": 2}}


def test_two_ranks_give_what_one_gives(place, straight, tmp_path):
    cases = [(str(tmp_path / name), straight["settings"] | {"parallel": axes}, None) for name, axes in MESHES.items()]
    wanted = straight["whole"]
    for name, found in zip(MESHES, run_world("gap_world:sweeps", 2, args={"cases": cases}, folder=tmp_path)):
        for one, two in zip(runs(wanted), runs(found), strict=True):
            worst = max(abs(a - b) / b for a, b in zip(one["losses"], two["losses"], strict=True))
            assert worst < 1e-10, f"{name}: losses differ by {worst:.1e}"
            for step, scores in one["steps"].items():
                for evaluation, values in scores.items():
                    assert two["steps"][step][evaluation] == pytest.approx(values, rel=1e-9), f"{name}, step {step}, {evaluation}"
    assert math.isfinite(worst)
