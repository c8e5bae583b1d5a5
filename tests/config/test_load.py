"""Loading: merging, origins, overrides, short forms, presets."""

from pathlib import Path

import pytest

from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load, schema, to_yaml

CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml") if path.stem != "smollm2_sft"
)  # starts from a folder


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the current folder."""
    monkeypatch.chdir(tmp_path)

    def _write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return next(iter(files)) + ".yaml"

    return _write


def test_origin_of_every_value(write):
    a = write(
        a="extends: sub.yaml\ntrain:\n  steps: 5\nmodel:\n  preset: llama3_8b\n  layers: 2\n", sub="optim: {lr: 1e-4}\ntrain: {steps: 9}\n"
    )
    loaded = load(a, ["--train.seq_len", "64"])
    assert (loaded.run.optim.lr, loaded.run.train.steps, loaded.run.model.layers, loaded.run.model.hidden) == (1e-4, 5, 2, 4096)
    expected = {
        "optim.lr": "sub.yaml:1",
        "train.steps": "a.yaml:3",
        "model.layers": "a.yaml:6",
        "model.attention.heads": "preset llama3_8b",
        "train.seq_len": "command line",
        "optim.eps": "default",
    }
    assert {name: loaded.origin[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "read", "value"),
    [
        (["--train.steps", "7"], "train.steps", 7),
        (["--train.steps=7"], "train.steps", 7),
        (["--no-checkpoint.asynchronous"], "checkpoint.asynchronous", False),
        (["--checkpoint.asynchronous", "--seed", "3"], "checkpoint.asynchronous", True),
        (["--metrics.tensorboard", "false"], "metrics.tensorboard", False),
        (["--parallel.dp_shard", "-1"], "parallel.dp_shard", -1),
        (["--optim.lr", "1e-4"], "optim.lr", 1e-4),
        (["--optim.betas.0", "0.8"], "optim.betas", (0.8, 0.95)),
        (["--name", "0012"], "name", "0012"),
        (["--guards.spike.action", "off"], "guards.spike.action", "off"),
        (["--resume", "none"], "checkpoint.resume", "none"),
        (["--engine", "native"], "engine.kind", "native"),
        (["--data.train.0.path", "x"], "data.train.0.path", "x"),
        (["--precision", "bf16", "--precision.reduce", "bf16"], "precision.reduce", "bf16"),
        (["--precision.reduce", "bf16", "--precision", "bf16"], "precision.reduce", "bf16"),
        (["--model", "smollm2_135m", "--model.layers", "2"], "model.layers", 2),
        (["--kernels.attention", "sdpa"], "kernels.attention", "sdpa"),
        (["--optim.max_grad_norm", "null"], "optim.max_grad_norm", None),
        (["--train.phases", "[{steps: 1}]", "--train.phases.0.mix.2024", "2"], "train.phases.0.mix.2024", 2.0),
    ],
)
def test_command_line_forms(words, read, value):
    run = load(None, words).run
    for key in read.split("."):
        run = run[int(key) if isinstance(run, list) else key] if isinstance(run, list | dict) else getattr(run, key)
    assert run == value


def test_list_entries_by_number(write):
    a = write(a="train: {phases: [{steps: 1}, {steps: 2, seq_len: 16}]}\n")
    loaded = load(a, ["--train.phases.1.seq_len", "8192", "--train.phases.2.steps", "4"])
    assert [(p.steps, p.seq_len) for p in loaded.run.train.phases] == [(1, None), (2, 8192), (4, None)]
    assert loaded.origin["train.phases.1.steps"] == "a.yaml:1"
    assert loaded.origin["train.phases.1.seq_len"] == "command line"
    with pytest.raises(ConfigError, match=r"train\.phases has 2 entries"):
        load(a, ["--train.phases.5.steps", "1"])


def test_short_forms_merge_across_files(write):
    a = write(
        a="extends: [b.yaml, c.yaml]\nprecision: bf16\nmodel: {layers: 3}\n",
        b="precision: {reduce: bf16}\nmodel: smollm2_135m\n",
        c="data: {train: one}\nengine: native\nmodel: {tie_embeddings: false}\n",
    )
    run = load(a, ["--data.train.0.weight", "2"]).run
    assert (run.precision.compute, run.precision.reduce) == ("bf16", "bf16")
    assert (run.model.layers, run.model.hidden, run.model.tie_embeddings) == (3, 576, False)
    assert (run.data.train[0].path, run.data.train[0].weight) == ("one", 2.0)


def test_child_may_change_the_preset(write):
    a = write(a="extends: b.yaml\nmodel: {preset: qwen3_8b}\n", b="model: {preset: qwen3_0_6b, max_seq_len: 77}\n")
    model = load(a, []).run.model
    assert (model.layers, model.tie_embeddings, model.max_seq_len) == (36, False, 77)


def test_another_kind_of_a_union_starts_afresh(write):
    scaling = "{kind: yarn, factor: 4, original_seq_len: 64}"
    a = write(a=f"model: {{norm: {{kind: rms_norm, placement: sandwich}}, position: {{scaling: {scaling}}}}}\n")
    run = load(a, ["--model.position.scaling", "{kind: ntk, factor: 2}", "--model.norm", "{kind: layer_norm}"]).run
    assert run.model.position.scaling.model_dump() == {"kind": "ntk", "factor": 2.0}
    assert run.model.norm.placement == "sandwich"


def test_fp64_sets_every_format():
    precision = load(None, ["--precision", "fp64"]).run.precision
    assert {precision.compute, precision.params, precision.reduce, precision.accumulate, precision.optimizer} == {"fp64"}


def test_anchors_and_merge_keys(write):
    a = write(a="train:\n  phases:\n    - &p {steps: 1, seq_len: 8}\n    - {<<: *p, seq_len: 16}\n")
    assert [(p.steps, p.seq_len) for p in load(a, []).run.train.phases] == [(1, 8), (1, 16)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_round_trip(path, tmp_path):
    run = load(path, []).run
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    assert load(tmp_path / "config.yaml", []).run == run


@pytest.mark.parametrize("text", ["1e-4", "off", "12", "null", "true", "2026-01-01", "a: b", "1:30", "~", ""])
def test_text_that_looks_like_something_else_survives(text, tmp_path):
    run = load(None, [f"--metrics.sample={text}"]).run
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    assert load(tmp_path / "config.yaml", []).run.metrics.sample == (text if text not in ("null", "~") else None)


def test_schema_completes_sections():
    properties = schema()["properties"]
    assert {"model", "optim", "extends"} <= set(properties)
    assert "engine" in properties and schema()["additionalProperties"] is False
