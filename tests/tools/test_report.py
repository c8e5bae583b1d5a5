"""The report of a run folder, from the lines it recorded."""

import json
import math
import sys

import pytest
import yaml

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.tools.history import History
from llmtrain.tools.markdown import table
from llmtrain.tools.report import main, write_report
from llmtrain.tools.report_plot import smoothed, sparkline


def train(step: int, **values) -> dict:
    line = {"kind": "train", "step": step, "loss": 5.0 - step / 100, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 100, "seconds": 0.5}
    return {**line, "tokens_per_second": 200.0, "mfu": 0.25, "memory_gb": 1.5, "data_seconds": 0.01, "spike": 0, "skipped": 0, **values}


@pytest.fixture
def folder(tmp_path):
    """A run of 40 steps with a spike, two validations and a checkpoint."""
    lines = [train(step, spike=int(step == 30)) for step in range(1, 41)]
    lines += [{"kind": "validation", "step": step, "source": "plays", "loss": loss} for step, loss in ((20, 4.9), (40, 4.7))]
    lines.append({"kind": "event", "step": 30, "text": "spike: loss 9 > 5"})
    write(tmp_path, lines)
    cfg = RunConfig(name="demo", model={"layers": 3, "hidden": 64}, parallel={"dp_shard": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    (tmp_path / "env.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.13.0"}}))
    (tmp_path / "checkpoints/step-00000040").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000050.partial").mkdir(parents=True)
    return tmp_path


def write(folder, lines) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def cell(text: str, name: str) -> str:
    return next(line.split("|")[2].strip() for line in text.splitlines() if line.startswith(f"| {name}"))


def test_numbers_are_those_recorded(folder):
    text = write_report(folder, {"bigram": 5.0, "sample": "ROMEO: ```light```", "export": folder / "hf"}).read_text()
    assert text.startswith("# Run demo\n")
    assert cell(text, "steps") == "40" and cell(text, "tokens |") == "4,000"
    assert cell(text, "tokens/s") == "200" and cell(text, "MFU") == "25.0%" and cell(text, "training time") == "00:20"
    assert cell(text, "waiting for data") == "2.00% of the time" and cell(text, "spikes") == "1"
    mean = sum(5.0 - step / 100 for step in range(21, 41)) / 20
    assert cell(text, "training loss") == f"{mean:.4f} nats/token (perplexity {math.exp(mean):.2f})"
    assert f"| plays | 4.9000 (step 20) | 4.7000 (step 40) | 4.7000 (step 40) | {math.exp(4.7):.2f} |" in text
    assert "5.0000 nats/token on plays; the run ends 0.3000 below it" in text
    assert "3 layers, width 64" in text and "dp_shard 2" in text and "| packages.torch | 2.13.0 |" in text
    assert "(step-00000040)" in text and "partial" not in text and f"`{folder / 'hf'}`" in text
    assert "````text\nROMEO: ```light```\n````" in text and "- step 30: spike" in text


def test_a_worse_run_is_not_called_better(folder):
    assert "the run ends 0.2000 above it" in write_report(folder, {"bigram": 4.5}).read_text()


def test_the_plot_is_drawn(folder):
    pytest.importorskip("matplotlib")
    assert "](report.png)" in write_report(folder, {"bigram": 5.0}).read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(folder, monkeypatch):
    (folder / "report.png").write_bytes(b"of an earlier state")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_report(folder, {}).read_text()
    assert "pip install llmtrain[viz]" in text and "▁" in text and "report.png" not in text
    assert not (folder / "report.png").exists()


def test_it_can_be_written_again(folder, capsys):
    first = write_report(folder, {"bigram": 5.0, "sample": "ROMEO:", "export": None}).read_text()
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    assert (folder / "report.md").read_text() == first


def test_replayed_steps_count_once(tmp_path):
    write(
        tmp_path,
        [
            train(1),
            train(2),
            train(3, loss=9.0),
            {"kind": "validation", "step": 3, "source": "plays", "loss": 8.0},
            train(3, loss=1.0),
            train(4),
        ],
    )
    history = History.read(tmp_path)
    assert [line["step"] for line in history.train] == [1, 2, 3, 4] and history.train[2]["loss"] == 1.0 and not history.validation
    assert history.complete and history.seconds() == 2.0


def test_lines_left_out_are_not_made_up(tmp_path):
    write(tmp_path, [train(10), train(20, tokens_per_second=300.0), train(30, tokens_per_second=400.0)])
    text = write_report(tmp_path, {}).read_text()
    assert "00:02 (of the 3 recorded steps)" in text and cell(text, "tokens/s") == "300"


def test_a_run_that_ended_in_nan(tmp_path):
    write(tmp_path, [train(1), train(2, loss="NaN", grad_norm="NaN"), {"kind": "validation", "step": 2, "source": "a|b", "loss": "NaN"}])
    text = write_report(tmp_path, {}).read_text()
    assert "mean of the last 1 steps" in text and "nan (step 2)" in text and "a\\|b" in text


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path, {})
    write(tmp_path, [{"kind": "event", "step": 0, "text": "hello"}])
    with pytest.raises(UserError, match="no training step"):
        write_report(tmp_path, {})


def test_sparkline():
    assert sparkline([3.0, 2.0, math.nan, 1.0]) == "█▅▁" and sparkline([]) == "" and sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)])) == 60


def test_smoothing_has_no_lag_and_ignores_a_spike():
    line = [10.0 - i / 10 for i in range(100)]
    assert smoothed(line) == pytest.approx(line)
    assert max(abs(a - b) for a, b in zip(smoothed([*line[:50], 1000.0, *line[51:]]), line)) < 0.2


def test_table():
    assert table(("a", ""), [("x|y", 1)]) == "| a |  |\n|---|---|\n| x\\|y | 1 |"


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (
            {"preset": "deepseek_v3", "ffn": {"kind": "moe", "balance": {"weight": 1e-4, "sequences": 1}}},
            {
                "attention": "128 latent heads, queries from 1536, keys and values from 512, head width 128 + 64, values 128",
                "feed-forward": "256 experts, 8 per token by sigmoid, width 2048 (swiglu); 1 shared; first 3 blocks dense, 18432",
                "balance of experts": "loss 0.0001 over each sequence, bias moved by 0.001",
            },
        ),
        (
            {"preset": "gpt3_xl_bigmac", "ffn": {"kind": "moe", "capacity": {"factor": 1.2}}},
            {
                "attention": "16 heads, 16 key/value heads, head width 128",
                "feed-forward": "64 experts, 8 per token by softmax, width 2048 (gelu); between projections to 512; capacity 1.2",
                "balance of experts": "nothing",
            },
        ),
    ],
    ids=["deepseek", "bigmac"],
)
def test_the_shape_of_a_mixture_of_experts(folder, model, rows):
    (folder / "config.yaml").write_text(yaml.safe_dump(RunConfig(model=model).model_dump(mode="json")))
    text = write_report(folder, {}).read_text()
    assert {name: cell(text, f"{name} |") for name in rows} == rows
