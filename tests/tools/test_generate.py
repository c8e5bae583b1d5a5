"""Sampling, the cache, and a run folder's model."""

import io
import json

import pytest
import torch
import yaml

from llmtrain.config.cache_split import Answering, fixed_parts, layer_bytes
from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.device import Memory, select
from llmtrain.device.cpu import CpuDevice
from llmtrain.errors import UserError
from llmtrain.model import initialise
from llmtrain.model.decode import CachedRunner, UncachedRunner
from llmtrain.model.decode import generate as generate_tokens
from llmtrain.model.sampling import Sampling
from llmtrain.ops import Mask
from llmtrain.tools import generate, host_layers, open_model
from llmtrain.tools.open_model import load_model
from llmtrain.train.checkpoint import Checkpointer

torch.set_num_threads(1)


def fixed(logits: list[float]):
    """A model that always says the same."""
    return lambda tokens: torch.tensor([logits])


def successor(tokens: torch.Tensor) -> torch.Tensor:
    """A model that is sure of last + 1, modulo 10."""
    return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 10, 10).double() * 50


def sample(last_logits, tokens: list[int], *, max_new: int, **rule) -> list[int]:
    """`tokens` and what a model without a cache adds, as at the end of a run."""
    runner = UncachedRunner(lambda rows: last_logits(rows)[:, None].expand(-1, rows.shape[1], -1), slots=1, capacity=len(tokens) + max_new)
    return generate_tokens(runner, [tokens], Sampling(max_new=max_new, **rule))[0].tokens


def test_greedy_and_stop():
    assert sample(successor, [3], max_new=4, seed=0, temperature=0) == [3, 4, 5, 6, 7]
    assert sample(successor, [3], max_new=40, seed=0, stop_ids=(6,)) == [3, 4, 5]
    assert sample(fixed([1.0, 1.0]), [0], max_new=2, seed=0, temperature=0) == [0, 0, 0]


def test_the_seed_decides():
    draws = [tuple(sample(fixed([0.0] * 50), [0], max_new=20, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("options, named", [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p")])
def test_bad_options(options, named):
    with pytest.raises(UserError, match=named):
        sample(successor, [1], max_new=1, seed=0, **options)


def test_a_broken_model_and_an_empty_prompt():
    with pytest.raises(UserError, match="not finite"):
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
    monkeypatch.setattr(open_model, "run_tokenizer", lambda run, cfg: Bytes())
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
    folder, cfg, _ = run
    model = load_model(cfg, checkpoint=folder / "checkpoints/step-00000003")

    @torch.no_grad()
    def whole(tokens):
        return model(tokens, positions=torch.arange(tokens.shape[1])[None], mask=Mask())["logits"][:, -1]

    rule = Sampling(max_new=30, seed=3, temperature=0.8, top_p=0.95)
    cached = generate_tokens(CachedRunner(model, slots=1, capacity=40), [[65, 66]], rule)[0].tokens
    assert cached == sample(whole, [65, 66], max_new=30, seed=3, top_p=0.95)


def read(capsys) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_verb(run, capsys):
    folder, _, _ = run
    texts = []
    for _ in range(2):
        assert generate.main([str(folder), "-p", "ROMEO:", "--max-new", "12", "--seed", "7"]) == 0
        out, err = read(capsys)
        texts.append(out)
    assert texts[0] == texts[1] and texts[0].startswith("ROMEO:") and len(texts[0]) > len("ROMEO:\n")
    assert "tokens/s" in err and "cache" in err


def test_many_prompts_print_in_order_and_each_as_if_alone(run, capsys, tmp_path):
    folder, _, _ = run
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "To be"}\n\n{"prompt": "O", "seed": 9}\n')
    words = [str(folder), "--max-new", "10", "--temperature", "0.5"]
    alone = []
    for prompt, seed in (("A longer prompt", 1234), ("To be", 1234), ("O", 9)):
        assert generate.main([*words, "-p", prompt, "--seed", str(seed)]) == 0
        alone.append(read(capsys)[0])
    out = tmp_path / "deep" / "out.jsonl"
    more = ["-p", "A longer prompt", "--prompts", str(tmp_path / "prompts.jsonl"), "--batch", "2", "--out", str(out)]
    for flag in ("--stream", "--no-stream"):
        assert generate.main([*words, *more, flag]) == 0
        assert read(capsys)[0] == "\n".join(alone)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] + line["text"] + "\n" for line in lines] == alone
    assert {line["finished"] for line in lines} <= {"length", "stop"} and [line["seed"] for line in lines] == [1234, 1234, 9]


def test_prompts_from_stdin_and_several_samples(run, capsys, monkeypatch):
    folder, _, _ = run
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert generate.main([str(folder), "--prompts", "-", "--samples", "2", "--max-new", "8", "--seed", "3"]) == 0
    both = read(capsys)[0]
    for seed in ("3", "4"):
        assert generate.main([str(folder), "-p", "two", "--max-new", "8", "--seed", seed]) == 0
        assert read(capsys)[0] in both


def test_stop_strings_of_the_verb(run, capsys, tmp_path):
    folder, _, _ = run
    words = [str(folder), "-p", "ROMEO:", "--max-new", "24", "--greedy"]
    assert generate.main(words) == 0
    text = read(capsys)[0].removeprefix("ROMEO:").removesuffix("\n")
    stop = text[5:7]
    out = tmp_path / "o.jsonl"
    assert generate.main([*words, "--stop", stop, "--stop", "never there", "--out", str(out)]) == 0
    assert read(capsys)[0] == "ROMEO:" + text[: text.find(stop)] + "\n"
    line = json.loads(out.read_text())
    assert line["finished"] == "stop" and len(line["tokens"]) < 24, "nothing is generated beyond the stop string"
    with pytest.raises(UserError, match="--stop ''"):
        generate.main([*words, "--stop", ""])


def test_ctrl_c_keeps_what_there_is(run, capsys, monkeypatch, tmp_path):
    folder, _, _ = run
    words = [
        str(folder),
        "-p",
        "ROMEO:",
        "-p",
        "JULIET:",
        "--max-new",
        "24",
        "--greedy",
        "--batch",
        "1",
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    assert generate.main(words) == 0
    whole = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    calls = iter(range(10))
    step = CachedRunner.step

    def interrupted(self, rows):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(CachedRunner, "step", interrupted)
    assert generate.main(words) == 130
    out, err = read(capsys)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert lines[0]["tokens"] == whole[0]["tokens"][:8] and lines[0]["finished"] == "interrupted" and lines[1]["tokens"] == []
    assert "ROMEO:" + lines[0]["text"] in out and "JULIET:" in out and "interrupted: 8 tokens" in err


def test_what_a_user_can_get_wrong(run, tmp_path):
    folder, cfg, _ = run
    with pytest.raises(UserError, match="exceed model"):
        generate.main([str(folder), "-p", "ROMEO:", "--max-new", "100"])
    with pytest.raises(UserError, match="no run folder"):
        generate.main([str(tmp_path / "nowhere"), "-p", "x"])
    with pytest.raises(UserError, match="checkpoint"):
        generate.main([str(folder), "-p", "x", "--max-new", "5", "--checkpoint", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no prompt"):
        generate.main([str(folder)])
    with pytest.raises(UserError, match="--batch 0"):
        generate.main([str(folder), "-p", "x", "--batch", "0"])
    with pytest.raises(UserError, match="--dtype 'fp8'"):
        generate.main([str(folder), "-p", "x", "--dtype", "fp8"])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        generate.main([str(folder), "--prompts", str(tmp_path / "bad.jsonl")])
    other = cfg.model_copy(update={"model": cfg.model.model_copy(update={"layers": 3})})
    with pytest.raises(UserError, match=r"does not fit.*blocks\.2"):
        load_model(other, checkpoint=folder / "checkpoints/step-00000003")


def test_layers_on_the_host_give_the_same_text(run, capsys, monkeypatch):
    folder, cfg, _ = run
    words = [str(folder), "-p", "ROMEO:", "-p", "A longer prompt", "--max-new", "16", "--temperature", "0.7"]
    assert generate.main(words) == 0
    text, _ = read(capsys)
    assert generate.main([*words, "--host-layers", "1"]) == 0
    again, err = read(capsys)
    assert again == text and f"of 1 of {cfg.model.layers} layers on the host" in err
    # A device with room for the model, a prompt's pass and the cache of one layer and a half.
    opened = open_model.open_model(folder, device="cpu")
    tokens = max(len(opened.encode(text)) for text in ("ROMEO:", "A longer prompt")) + 16
    asked = Answering(rows=2, tokens=tokens, itemsize=next(opened.model.parameters()).dtype.itemsize)
    room = sum(fixed_parts(cfg.model, asked).values()) + 1.5 * layer_bytes(cfg.model, asked)
    monkeypatch.setattr(CpuDevice, "memory", lambda self: Memory(0, 0, int(room / (1 - host_layers.RESERVED)) + 1))
    assert generate.main([*words, "--host-layers", "auto"]) == 0
    again, err = read(capsys)
    assert again == text and f"of {cfg.model.layers - 1} of {cfg.model.layers} layers on the host" in err
    monkeypatch.setattr(CpuDevice, "memory", lambda self: Memory(0, 0, 1000))
    with pytest.raises(UserError, match="weights and a prompt's pass alone exceed"):
        generate.main([*words, "--host-layers", "auto"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--host-layers", "few"], "--host-layers few: allowed are auto and a number"),
        (["--host-layers", "9"], "--host-layers 9: the model has"),
        (["--host-layers", "1", "--pp", "2"], "layers on the host need --pp 1"),
        (["--hardware", "v100-32"], "belong to --plan"),
        (["--plan", "0"], "--plan 0: give a number of tokens"),
        (["--plan", "9", "--ep", "2"], "would keep the same cache"),
    ],
)
def test_what_cannot_be_on_the_host_is_refused(run, words, message):
    with pytest.raises(UserError, match=message):
        generate.main([str(run[0]), "-p", "x", "--max-new", "2", *words])


def test_a_plan_needs_neither_weights_nor_prompts(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {layers: 2, hidden: 64, vocab_size: 100}")
    assert generate.main([str(tmp_path), "--plan", "4096", "--hardware", "v100-32", "--host-memory", "1", "--tp", "2"]) == 0
    out, _ = read(capsys)
    assert "8 sequences of 4,096 tokens on 2 x v100-32 of 32.0 GiB" in out and "on the host: 0 of 2 layers, 0.0 GiB: fits" in out


def test_other_formats_than_the_stored_one(run):
    folder, cfg, state = run
    opened = open_model.open_model(folder, device="cpu", dtype="fp32")
    for name, parameter in opened.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, state[f"{name}.weight"].float())
    model, same, tokenizer, *_ = opened
    assert same == cfg.model and tokenizer.eod_id == 0 and opened.stop_ids == (0,) and model.rope.base == 1e6


def test_no_token_is_dropped_whatever_the_capacity():
    ffn = {"kind": "moe", "experts": 4, "hidden": 24, "capacity": {"factor": 0.25, "sequences": 2}}
    shape = {"layers": 1, "hidden": 32, "vocab_size": 61, "attention": {"heads": 2}, "init": {"std": 0.3}}
    logits = []
    for changes in ({}, {"capacity": None}):
        cfg = ModelConfig.model_validate(shape | {"ffn": ffn | changes})
        model = open_model.empty_model(cfg, select("cpu"), torch.float64)
        initialise(model, cfg, 1)
        logits.append(model(torch.arange(40).view(2, 20), mask=Mask())["logits"])
    assert torch.equal(*logits)
