"""What else a user does around a run: dry runs of every configuration, a profile, a passage, the report, the kernels, the configuration."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from llmtrain.stages import dry_mesh, pretrain

ROOT = Path(__file__).parents[2]
# The long file of Pangu Ultra is the short one with two phases more; tests/stages/test_dry_mesh.py builds some of its ranks.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in ("pangu_ultra_135b_long", "smollm2_sft"))
MILLIONS = {"llama3_8b": 8030, "llama3_70b": 70554, "smollm2_135m": 134.5, "pangu_ultra_135b": 135000, "qwen3_8b": 8191, "qwen3_0_6b": 596}
MILLIONS |= {"mixtral_8x7b": 46703, "qwen3_30b_a3b": 30532, "pangu_ultra_moe_718b": 719094 + 12443, "deepseek_v3": 671026 + 11610}

pytestmark = pytest.mark.xdist_group("verbs")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_passes_its_dry_run(lab, path, capsys, monkeypatch):
    monkeypatch.chdir(lab.folder)
    # Of the Pangus' 128 and 256 ranks, which take a minute or two (docs/dry-mesh.md), some of every stage.
    every = dry_mesh.role_ranks
    monkeypatch.setattr(dry_mesh, "role_ranks", lambda shape: every(shape)[:: len(every(shape)) // 16 | 1])
    own = ("--tokenizer.path", "tok.model") if path.stem == "quickstart" else ()
    assert pretrain.main(["-c", str(path), "--dry-run", "--device", "cpu", *own]) == 0
    out = capsys.readouterr().out
    built = int(re.search(r"built on meta: ([\d,]+) parameters", out).group(1).replace(",", ""))
    counted = int(re.search(r"^  total +([\d,]+)$", out, re.MULTILINE).group(1).replace(",", ""))
    assert built == counted
    if path.stem in MILLIONS:
        assert built / 1e6 == pytest.approx(MILLIONS[path.stem], rel=0.01)
    loss, expected = map(float, re.search(r"options: loss (\S+) \(.*ln 256 = (\S+)\)", out).groups())
    assert loss == pytest.approx(expected, rel=0.2)


@pytest.fixture(scope="session")
def run(lab):
    return lab.train("verbs", "--train.steps", "8", "--metrics.profile", "{start: 3, steps: 2}")


def test_a_profile_window_leaves_a_trace(run):
    trace = run.path / "profile" / "rank-0-steps-3-4.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::mm" in trace.with_suffix("").with_suffix(".txt").read_text()


def test_generate(lab, run):
    words = ("generate", "runs/verbs", "-p", "KING", "--max-new", "12", "--seed")
    texts = [lab.command(*words, seed) for seed in ("1", "2")]
    assert all(code == 0 and out.startswith("KING") and len(out) > 6 for code, out, err in texts)
    assert all(re.fullmatch(r"\d+ tokens in .*\n", err) for _, _, err in texts)
    assert texts[0][1] != texts[1][1]


def test_generate_on_two_ranks_is_that_of_one(lab, run):
    words = ("generate", "runs/verbs", "-p", "KING", "-p", "The ", "--max-new", "12", "--temperature", "0", "--dtype", "fp64", "--out")
    alone, shared = lab.command(*words, "one.jsonl"), lab.command(*words, "two.jsonl", "--tp", "2")
    assert (alone[0], shared[0]) == (0, 0), alone[2] + shared[2]
    assert alone[1] == shared[1] and alone[1].startswith("KING")
    one, two = ((lab.folder / name).read_text() for name in ("one.jsonl", "two.jsonl"))
    assert one == two and len(one.splitlines()) == 2
    assert re.fullmatch(r"\d+ tokens in .*\n", shared[2])


def test_perplexity_on_two_ranks_is_that_of_one(lab, run):
    words = ("eval", "runs/verbs", "perplexity", "plays-validation", "--context", "64", "--tokens", "500", "--dtype", "fp64", "--out")
    alone, shared = lab.command(*words, "one.json"), lab.command(*words, "two.json", "--pp", "2")
    assert (alone[0], shared[0]) == (0, 0), alone[2] + shared[2]
    assert alone[1] == shared[1] and "plays-validation" in alone[1]
    one, two = (json.loads((lab.folder / name).read_text()) for name in ("one.json", "two.json"))
    texts = [found["results"].pop("texts") for found in (one, two)]
    assert one == two
    for mine, theirs in zip(*texts, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(theirs[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value) for key, value in mine.items())


def test_generate_from_a_folder_that_is_no_run(lab):
    code, out, err = lab.command("generate", "data-of-mine", "-p", "x")
    assert (code, out, err) == (
        1,
        "",
        "llmtrain: data-of-mine is no run folder (config.yaml) and no Hugging Face folder (config.json): it is neither\n",
    )


def test_report(lab, run):
    (run.path / "report.md").unlink()
    code, out, _ = lab.command("report", "runs/verbs")
    assert code == 0 and "report.md" in out
    assert f"mean of the last 8 steps | {sum(run.losses()) / 8:.4f} nats/token" in (run.path / "report.md").read_text()


def test_kernels(lab):
    code, out, _ = lab.command("kernels", "--device", "cpu")
    assert code == 0 and re.search(r"attention.*sdpa", out)


def test_config_show_of_a_file_and_of_a_run(lab, run):
    code, out, _ = lab.command("config", "show", "-c", "base.yaml", "--train.steps", "8")
    assert code == 0 and re.search(r"steps: 8 +# command line", out) and re.search(r"layers: 2 +# .*base.yaml", out)
    kept = lab.folder / "kept.yaml"
    shutil.copy(run.path / "config.yaml", kept)
    code, out, _ = lab.command("config", "diff", "kept.yaml", "runs/verbs")
    assert code == 0 and "train.steps" not in out


def test_config_of_a_run_starts_the_same_run(lab, run):
    kept = lab.folder / "same.yaml"
    shutil.copy(run.path / "config.yaml", kept)
    again = lab.train("verbs-again", "--metrics.profile", "null", config="same.yaml")
    assert again.values() == run.values()
