"""Sampling, the cache, and a run folder's model."""

from collections import Counter

import pytest
import torch
import yaml

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.tools import generate
from llmtrain.tools.generate import cached_logits, load_model, next_token, sample
from llmtrain.train.checkpoint import Checkpointer

torch.set_num_threads(1)


def fixed(logits: list[float]):
    """A model that always says the same."""
    return lambda tokens: torch.tensor([logits])


def successor(tokens: torch.Tensor) -> torch.Tensor:
    """A model that is sure of last + 1, modulo 10."""
    return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10).double() * 50


def test_greedy_and_stop():
    assert sample(successor, [3], max_new=4, seed=0, temperature=0) == [3, 4, 5, 6, 7]
    assert sample(successor, [3], max_new=40, seed=0, stop_ids=(6,)) == [3, 4, 5]
    assert sample(fixed([1.0, 1.0]), [0], max_new=2, seed=0, temperature=0) == [0, 0, 0]


def test_the_seed_decides():
    draws = [tuple(sample(fixed([0.0] * 50), [0], max_new=20, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_temperature_and_nucleus():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw = lambda top_p, temperature=1.0: Counter(  # noqa: E731
        next_token(probabilities.log(), temperature=temperature, top_p=top_p, generator=generator) for _ in range(4000)
    )
    generator = torch.Generator().manual_seed(0)
    whole = draw(1.0)
    assert [whole[i] / 4000 for i in range(4)] == pytest.approx(probabilities.tolist(), abs=0.03)
    nucleus = draw(0.7)
    assert set(nucleus) == {0, 1} and nucleus[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    assert set(draw(0.01)) == {0}
    cold = draw(1.0, temperature=0.5)
    assert cold[0] / 4000 == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)


@pytest.mark.parametrize("options, named", [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p")])
def test_bad_options(options, named):
    with pytest.raises(UserError, match=named):
        sample(successor, [1], max_new=1, seed=0, **options)


def test_a_broken_model_and_an_empty_prompt():
    with pytest.raises(UserError, match="no logit is finite"):
        sample(fixed([float("nan")] * 3), [1], max_new=1, seed=0)
    with pytest.raises(UserError, match="prompt is empty"):
        sample(successor, [], max_new=1, seed=0)


class Bytes:
    """A tokenizer of bytes; 0 ends a document."""

    eod_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with an untrained model of 256 tokens and one checkpoint, after 3 steps in the second phase."""
    phases = [{"steps": 2, "rope_base": 1e4}, {"steps": 2, "rope_base": 1e6}]
    model = {
        "layers": 2,
        "hidden": 32,
        "vocab_size": 256,
        "max_seq_len": 64,
        "attention": {"heads": 2, "kv_heads": 1},
        "ffn": {"hidden": 48},
    }
    cfg = RunConfig(
        model=model, train={"phases": phases, "seq_len": 32}, precision={"params": "fp64", "optimizer": "fp64"}, tokenizer={"path": "x"}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    shapes = _shapes(cfg)
    draw = torch.Generator().manual_seed(5)
    state = {"step": torch.tensor(3)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.3
        state[f"{name}.exp_avg"], state[f"{name}.exp_avg_sq"] = torch.zeros(shape).double(), torch.zeros(shape).double()
    checkpointer = Checkpointer(tmp_path, cfg.checkpoint, log=lambda text: None)
    checkpointer.save(3, state, {"step": 3, "position": 24})
    checkpointer.wait()
    monkeypatch.setattr(generate, "_tokenizer", lambda cfg: Bytes())
    return tmp_path, cfg, state


def _shapes(cfg: RunConfig) -> dict:
    from llmtrain.model import family

    with torch.device("meta"):
        return {name: p.shape for name, p in family.build(cfg.model, None, 64).named_parameters()}


def test_the_weights_of_the_checkpoint_are_those_of_the_model(run):
    folder, cfg, state = run
    model = load_model(cfg, checkpoint=folder / "checkpoints/step-00000003")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[f"{name}.weight"])
    assert model.rope.base == 1e6, "the base of the phase that the checkpoint ends in"


def test_the_cache_changes_nothing(run):
    from llmtrain.ops import Mask

    folder, cfg, _ = run
    model = load_model(cfg, checkpoint=folder / "checkpoints/step-00000003")

    @torch.no_grad()
    def whole(tokens):
        return model(tokens, positions=torch.arange(tokens.shape[1])[None], mask=Mask())["logits"][:, -1]

    cached = cached_logits(model, capacity=40)
    tokens = torch.tensor([[7, 3, 200, 9, 9, 41]])
    for length in (3, 4, 6):
        torch.testing.assert_close(cached(tokens[:, :length]), whole(tokens[:, :length]), rtol=1e-12, atol=1e-12)
    options = {"max_new": 30, "seed": 3}
    assert sample(cached_logits(model, capacity=40), [65, 66], **options) == sample(whole, [65, 66], **options)


def test_the_verb(run, capsys):
    folder, _, _ = run
    texts = []
    for _ in range(2):
        assert generate.main([str(folder), "-p", "ROMEO:", "--max-new", "12", "--seed", "7"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("ROMEO:") and len(texts[0]) > len("ROMEO:\n")


def test_what_a_user_can_get_wrong(run, tmp_path):
    folder, cfg, _ = run
    with pytest.raises(UserError, match="exceed model"):
        generate.main([str(folder), "-p", "ROMEO:", "--max-new", "100"])
    with pytest.raises(UserError, match="no run folder"):
        generate.main([str(tmp_path / "nowhere"), "-p", "x"])
    with pytest.raises(UserError, match="checkpoint"):
        generate.main([str(folder), "-p", "x", "--max-new", "5", "--checkpoint", str(tmp_path / "nowhere")])
    other = cfg.model_copy(update={"model": cfg.model.model_copy(update={"layers": 3})})
    with pytest.raises(UserError, match=r"does not fit.*blocks\.2"):
        load_model(other, checkpoint=folder / "checkpoints/step-00000003")
