"""The eval verb: perplexity, needles, the RoPE base, on models whose answers are known."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llmtrain.config.model import ModelConfig
from llmtrain.data.token_file import TokenWriter
from llmtrain.errors import UserError
from llmtrain.model import build, initialise
from llmtrain.ops import Call, resolve
from llmtrain.tools import evaluate, needle, perplexity, rope_base
from llmtrain.tools.open_model import OpenModel

torch.set_num_threads(1)
CFG = ModelConfig.model_validate(
    {
        "vocab_size": 256,
        "layers": 2,
        "hidden": 32,
        "max_seq_len": 256,
        "attention": {"heads": 2},
        "ffn": {"hidden": 48},
        "init": {"std": 0.2},
    }
)
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


class Bytes:
    """A tokenizer of bytes; 0 ends a document."""

    eod_id, bos_id = 0, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens) -> str:
        return bytes(tokens).decode(errors="replace")


class Copier(nn.Module):
    """Continues as the text went on after the last occurrence of the last `order` tokens within `reach`; else all is as likely."""

    def __init__(self, *, order: int = 8, reach: int = 10**9, sure: float = 20.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.order, self.reach, self.sure = order, reach, sure
        self.rope = SimpleNamespace(base=1e4)
        self.seen: list[int] = []

    def set_rope_base(self, base):
        """A larger base reaches further."""
        self.rope.base, self.reach = base, int(base / 100)

    def forward(self, tokens, *, mask, cache=None, last=None, positions=None, targets=None):
        rows = tokens.tolist()
        if cache is not None:
            layer = cache.layer("0")
            before = self.seen[: layer.length]
            self.seen = before + rows[0]
            layer.length = len(self.seen)
            rows, offset = [self.seen], len(before)
        else:
            offset = 0
        logits = torch.stack([torch.stack([self.after(row[: i + 1]) for i in range(offset, len(row))]) for row in rows])
        if targets is not None:
            return {"ce_sum": nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)}
        return {"logits": logits if last is None else logits[:, logits.shape[1] - last :]}

    def after(self, row):
        logits, key = torch.zeros(256), row[-self.order :]
        for at in range(len(row) - self.order - 1, max(-1, len(row) - self.reach), -1):
            if row[at : at + self.order] == key:
                logits[row[at + self.order]] = self.sure
                break
        return logits


@pytest.fixture
def opened():
    with torch.device("meta"):
        model = build(CFG, resolve({}, Call(device="cpu", dtype=torch.float64, head_dim=16)), 16)
    model = model.double().to_empty(device="cpu").eval()
    initialise(model, CFG, 3)
    return OpenModel(model, CFG, Bytes(), (0,))


def copier(**options) -> OpenModel:
    return OpenModel(Copier(**options), CFG, Bytes(), (0,))


def test_perplexity_of_text_and_token_files(opened, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: opened)
    (tmp_path / "a.txt").write_text(TEXT)
    with TokenWriter(tmp_path / "a", np.uint16) as writer:
        writer.add(list(TEXT.encode()))
    words = ["x", "perplexity", str(tmp_path / "a.txt"), str(tmp_path / "a"), "--context", "64", "--stride", "16", "--tokens", "300"]
    assert evaluate.main([*words, "--out", str(tmp_path / "out" / "p.json")]) == 0
    ids = torch.tensor([list(TEXT.encode()[:64])])
    with torch.no_grad():
        logs = opened.model(ids, mask=__import__("llmtrain.ops").ops.Mask())["logits"].log_softmax(-1)
    first = -logs[0, :-1].gather(-1, ids[0, 1:, None]).mean().item()
    one = perplexity.perplexity(opened, str(tmp_path / "a.txt"), context=64, limit=64)
    assert one.nats_per_token == pytest.approx(first) and one.perplexity == pytest.approx(math.exp(first)) and one.tokens == 63
    assert one.bits_per_byte == pytest.approx(first / math.log(2)), "a token is a byte here"
    results = json.loads((tmp_path / "out" / "p.json").read_text())["results"]
    text, file = results["texts"]
    assert text["nats_per_token"] == file["nats_per_token"] and text["tokens"] == 299 and results["stride"] == 16
    assert f"{text['perplexity']:.2f}" in capsys.readouterr().out


def test_perplexity_of_what_cannot_be(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: opened)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match="has 1 tokens"):
        evaluate.main(["x", "perplexity", str(tmp_path / "short.txt")])
    with pytest.raises(UserError, match="--stride 9"):
        evaluate.main(["x", "perplexity", str(tmp_path / "short.txt"), "--context", "8", "--stride", "9"])
    with pytest.raises(FileNotFoundError):
        evaluate.main(["x", "perplexity", str(tmp_path / "nowhere.txt")])


def test_a_model_that_copies_finds_every_needle_and_a_short_sighted_one_only_the_near():
    found = needle.needle(copier(), Bytes().encode(TEXT), lengths=[200], depths=[0.0, 0.5, 1.0], trials=2)
    assert [(f.exact, f.chosen) for f in found] == [(1.0, 1.0)] * 3 and max(f.loss for f in found) < 0.01
    near = needle.needle(copier(reach=60), Bytes().encode(TEXT), lengths=[200], depths=[0.0, 1.0], trials=2)
    assert [(f.exact, f.chosen) for f in near] == [(0.0, 0.0), (1.0, 1.0)]
    assert near[0].loss == pytest.approx(math.log(256), rel=0.01), "far away all bytes are as likely"
    unsure = needle.needle(copier(sure=2.0), Bytes().encode(TEXT), lengths=[200], depths=[0.5], trials=2)[0]
    assert unsure.chosen == 1.0 and 2 < unsure.loss < math.log(256), "the loss grades what is found but not surely"


def test_needle_prompts_have_the_length_and_the_depth():
    encode = Bytes().encode
    for depth in (0.0, 0.3, 1.0):
        trials = list(needle._trials(copier(), encode(TEXT), 300, depth, trials=3, distractors=9, seed=1))
        for trial in trials:
            text = Bytes().decode(trial.prompt)
            answer = Bytes().decode(trial.answer)
            assert len(trial.prompt) == 300 and text.count(answer) == 1
            assert len({bytes(d) for d in [trial.answer, *trial.distractors]}) == 10
            place = text.index("\nThe secret number of")
            assert place == pytest.approx(
                depth * (300 - len("\nThe secret number of Paris is 12345.\n\nThe secret number of Paris is")), abs=8
            )
        assert len({Bytes().decode(t.answer) for t in trials}) == 3


def test_a_real_models_cached_scores_are_those_of_whole_passes(opened):
    from llmtrain.model.scoring import score

    trial = next(needle._trials(opened, Bytes().encode(TEXT), 150, 0.5, trials=1, distractors=4, seed=2))
    greedy, chosen, loss = needle.ask(opened.model, trial)
    scores = score(opened.model, [(trial.prompt, answer) for answer in [trial.answer, *trial.distractors]])
    assert loss == pytest.approx(-scores[0].logprob / len(trial.answer), rel=1e-6)
    assert needle.answer_scores(opened.model, trial)[0] == pytest.approx([s.logprob for s in scores], rel=1e-6)
    assert (greedy, chosen) == (scores[0].greedy, scores[0].logprob > max(s.logprob for s in scores[1:]))


def test_the_verb_needle(opened, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: opened)
    (tmp_path / "hay.txt").write_text(TEXT)
    pytest.importorskip("matplotlib", reason="the plot is drawn with it")
    words = ["x", "needle", "--lengths", "100", "140", "--depths", "0", "1", "--trials", "1", "--text", str(tmp_path / "hay.txt")]
    assert evaluate.main([*words, "--plot", str(tmp_path / "n.png"), "--out", str(tmp_path / "n.json")]) == 0
    assert len(json.loads((tmp_path / "n.json").read_text())["results"]) == 4
    assert (tmp_path / "n.png").stat().st_size > 2000 and "| 140 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="--lengths 20: needle and question alone have"):
        evaluate.main(["x", "needle", "--lengths", "20", "--text", str(tmp_path / "hay.txt")])
    with pytest.raises(UserError, match="haystack has"):
        evaluate.main(["x", "needle", "--lengths", "5000", "--text", str(tmp_path / "hay.txt")])
    with pytest.raises(UserError, match="allowed are 0 to 1"):
        evaluate.main(["x", "needle", "--lengths", "100", "--depths", "2", "--text", str(tmp_path / "hay.txt")])


def test_the_base_that_reaches_far_enough_is_chosen(tmp_path, capsys, monkeypatch):
    far = copier()
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: far)
    (tmp_path / "hay.txt").write_text(TEXT)
    words = ["x", "rope-base", "--length", "200", "--bases", "8000", "1e5", "20000", "--trials", "1", "--text", str(tmp_path / "hay.txt")]
    assert evaluate.main([*words, "--out", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [c["chosen"] for c in results["candidates"]] == [pytest.approx(1 / 3), 1.0, 1.0]
    assert results["best"] == 1e5 and far.model.rope.base == 1e4, "the model's own base is set again"
    from yaml import safe_load

    from llmtrain.config.run import RunConfig

    phases = safe_load(out[out.index("train:") :])
    phases["train"]["phases"][0]["steps"] = 5
    assert RunConfig.model_validate(phases).train.phases[0].rope_base == 1e5


def test_choosing_the_base():
    candidates = [rope_base.Candidate(*values) for values in ((1.0, 0.5, 2.0, 3.0), (2.0, 1.0, 0.5, 5.0), (3.0, 1.0, 1.0, 4.0))]
    assert rope_base.choose(candidates).base == 3.0
    assert rope_base.choose(candidates, "loss").base == 1.0


def test_without_lm_eval_the_message_says_what_to_install(opened, monkeypatch):
    monkeypatch.setattr(evaluate, "open_shared", lambda options, mesh: opened)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "llmtrain.tools.lm_eval_tasks", raising=False)
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[eval\]'"):
        evaluate.main(["x", "tasks", "piqa"])
