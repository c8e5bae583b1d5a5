"""Every error names the option, the value, what is allowed, and where it came from."""

import pytest

from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load
from llmtrain.errors import UserError


def message(words=(), text=None, tmp_path=None):
    path = None
    if text is not None:
        path = tmp_path / "a.yaml"
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, list(words))
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.steps", "-5"], "train.steps: -5 is not allowed (command line); allowed: an integer > 0 or null"),
        (["--lr", "3"], "lr: no such option (command line); `lr` lives at optim.lr and schedule.lr"),
        (["--model.layer", "2"], "model.layer: no such option (command line); did you mean model.layers?"),
        (["--optim.weight_decai", "2"], "did you mean optim.weight_decay?"),
        (["--guards.spike.action", "skp"], "allowed: one of count, skip, off; did you mean skip?"),
        (
            ["--model.norm.c_ffn", "atuo"],
            "model.norm.c_ffn: 'atuo' is not allowed (command line); allowed: a number > 0 or auto; did you mean",
        ),
        (["--model.preset", "lama3_8b"], "did you mean llama3_8b?"),
        (
            ["--engine.zero", "3"],
            "engine.kind: must be given, one of native, deepspeed, megatron (command line); with engine.zero: deepspeed",
        ),
        (["--engine", "fast"], "engine.kind: 'fast' is not allowed (command line); allowed: "),
        (
            ["--model.position.scaling.kind", "yarm"],
            "model.position.scaling.kind: 'yarm' is not allowed (command line); allowed: one of yarn",
        ),
        (["--model.position.scaling", "{kind: ntk}"], "model.position.scaling.factor: must be given, a number > 0 (command line)"),
        (
            ["--train.steps", "1", "--train.tokens", "2"],
            "not steps and tokens; null (for phases []) takes a value back (train.steps from command",
        ),
        (["--model.hidden", "10", "--model.attention.heads", "3"], "model.hidden from command line"),
        (["--train.steps"], "--train.steps on the command line is no switch, it needs a value: an integer > 0"),
        (["--no-optim.lr"], "--no-optim.lr on the command line is no switch"),
        (["steps", "3"], "'steps' on the command line is no option"),
        (["--data", "[1]"], "data: [1] is not allowed (command line); allowed: a section with train, validation"),
        (["--train.phases.x", "1"], "train.phases is a list; give the number of an entry"),
        (["--train.recompute", "[norm]"], "train.recompute.0: 'norm' is not allowed (command line); allowed: one of mla_up, norms, "),
        (["--train.recompute", "all"], "allowed: one of none, selective, full or a list, each entry one of mla_up, norms, activation, "),
        (["--train.recompute", "[norms, norms]"], "train.recompute names something twice: norms, norms"),
        (["--train.recompute", "[mla_up]"], "train.recompute mla_up: model.attention.kind gqa has no up-projections; take mla_up out"),
        (["--train.recompute", "[permute]"], "train.recompute permute: model.ffn.kind dense has no experts"),
        (["--train.offload", "[expert_output]"], "train.offload expert_output: model.ffn.kind dense has no experts"),
        (
            ["--train.offload", "[block_input, ffn_input]", "--train.recompute", "full"],
            "train.offload ffn_input: with train.recompute full a block keeps its input alone; take ffn_input out",
        ),
        (
            ["--train.offload", "[attention_input]", "--train.recompute", "[norms]"],
            "train.offload attention_input is what train.recompute norms computes again; take one of them out",
        ),
        (["--seed.a", "1"], "seed: {'a': 1} is not allowed (command line); allowed: an integer >= 0"),
    ],
)
def test_command_line(words, expected):
    assert expected in message(words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "a.yaml:3: train.steps is given twice, first at"),
        ("train:\n  steps: ten\n", "a.yaml:2); allowed: an integer > 0 or null"),
        ("name: 12\n", "name: 12 is not allowed"),
        ("- a\n", "a.yaml:1: a configuration is a mapping of sections"),
        ("a: [1\n", "not valid YAML"),
        ("extends: a.yaml\n", "extends goes in a circle"),
        ("extends: none.yaml\n", "no such configuration file (extends in"),
        ("extends: 3\n", "extends: 3 is not allowed"),
        ("train: &t {phases: [*t]}\n", "contains itself"),
        ("name: !thing x\n", "a.yaml:1: 'x' is not valid here"),
        ("optim:\n", "optim: null is not allowed"),
        ("data:\n  train:\n    - path: x\n      wieght: 1\n", "data.train.0.wieght: no such option"),
    ],
)
def test_files(text, expected, tmp_path):
    assert expected in message(text=text, tmp_path=tmp_path)


def test_several_errors_are_all_listed():
    text = message(["--lr", "1", "--train.seq_len", "0", "--optim.eps", "x"])
    assert text.startswith("3 problems:") and len(text.splitlines()) == 4


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load(tmp_path / "none.yaml", [])
