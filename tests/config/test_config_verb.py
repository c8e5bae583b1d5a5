"""`llmtrain config`, the arguments of stages, help, plugins."""

import json
import sys

import pytest

from llmtrain.config import fields
from llmtrain.config.arguments import parse_run_arguments
from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load
from llmtrain.errors import UserError
from llmtrain.plugins import load_plugins
from llmtrain.tools.config import main

PHASES = ["--train.phases", "[{steps: 3, batch: [{from_tokens: 0, size: 3}], mix: {a b: 1}}, {steps: 1, schedule: {kind: wsd}}]"]


@pytest.mark.parametrize("words", [[], PHASES, ["--model", "qwen3_8b", "--data.train", "[a, {path: b, weight: 2}]"]])
def test_show_is_the_configuration(words, capsys, tmp_path):
    words = [*words, "--model.vocab_size", "64"]
    main(["show", *words])
    shown, _, parameters = capsys.readouterr().out.partition("\nparameters")
    (tmp_path / "shown.yaml").write_text(shown)
    assert load(tmp_path / "shown.yaml", []).run == load(None, words).run
    assert "without embeddings" in parameters


def test_show_names_origins_and_what_depends_on_the_mesh(capsys):
    main(["show", "--precision.reduce", "bf16"])
    lines = capsys.readouterr().out.splitlines()
    assert any("reduce: bf16" in line and "# command line; mesh-dependent:" in line for line in lines)
    assert any("lr: 0.0003" in line and line.endswith("# default") for line in lines)


def test_presets_schema_help(capsys):
    assert [main(words) for words in (["show", "--presets"], ["schema"], ["help", "optim"])] == [0, 0, 0]
    out = capsys.readouterr().out
    assert "133.881 B" in out and "--optim.weight_decay  a number >= 0  [0.1]" in out
    main(["schema"])
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"
    with pytest.raises(ConfigError, match="did you mean train"):
        main(["help", "tain"])


def test_diff_of_a_file_and_a_run_folder(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 1e-4}\n")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("optim: {lr: 2e-4}\nseed: 1234\n")
    main(["diff", str(tmp_path / "a.yaml"), str(folder)])
    assert capsys.readouterr().out == "optim.lr: 0.0001 -> 0.0002\n"
    main(["diff", str(folder), str(folder)])
    assert capsys.readouterr().out == "no difference\n"


def test_stage_arguments(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 3}\n")
    for words in (["-c", str(path)], [f"--config={path}"]):
        loaded, options = parse_run_arguments([*words, "--dry-run", "--train.seq_len", "8"])
        assert (loaded.run.train.steps, loaded.run.train.seq_len, options.dry_run, options.config) == (3, 8, True, str(path))
    for words, text in (([], "nothing to run"), (["-c"], "needs a YAML file"), (["a.yaml"], "did you mean -c a.yaml")):
        with pytest.raises(ConfigError, match=text):
            parse_run_arguments(words)
    with pytest.raises(SystemExit) as stop:
        parse_run_arguments(["-h"])
    assert stop.value.code == 0 and "--checkpoint.resume" in capsys.readouterr().out


def test_every_option_is_documented():
    assert [".".join(f.path) for f in fields.walk() if not f.doc] == []


def test_plugins(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "good_plugin.py").write_text("loaded = True\n")
    (tmp_path / "bad_plugin.py").write_text("1 / 0\n")
    assert "good_plugin" in load_plugins(["good_plugin"]) and sys.modules["good_plugin"].loaded
    with pytest.raises(UserError, match=r"plugins: 'no_plugin' cannot be imported: ModuleNotFoundError"):
        load_plugins(["no_plugin"])
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_plugins(["bad_plugin"])


def test_plugin_entry_point(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "probe-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[llmtrain.plugins]\nprobe = probe_plugin:register\n")
    with pytest.raises(UserError, match=r"plugin 'probe' .* of probe does not load"):
        load_plugins([])
    (tmp_path / "probe_plugin.py").write_text("calls = []\ndef register():\n    calls.append(1)\n")
    assert "probe" in load_plugins(["probe"]) and sys.modules["probe_plugin"].calls == [1]
