"""The health of mixtures of experts over real runs of the loop: one whose router is driven to two experts, and one that is left alone."""

import json
import math
import re
import sys

import pytest
import torch
from fake_engine import TableEngine
from loop_runs import build, configure, loop

from llmtrain.config.ffn import MoEConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.train import ExpertGuardConfig
from llmtrain.device import select
from llmtrain.engine.base import StepResult
from llmtrain.parallel import mesh as world
from llmtrain.tools.history import History
from llmtrain.tools.report import write_report
from llmtrain.tools.report_experts import ExpertHistory
from llmtrain.train.console import progress_line
from llmtrain.train.experts import ExpertHealth, advice, limits
from llmtrain.train.guards import GuardStop
from llmtrain.train.metrics import TensorBoardSink

FFN = {"kind": "moe", "experts": 8, "top_k": 1, "hidden": 16, "dense_layers": 1, "router": {"score": "sigmoid"}}
STEPS = 17
DRIVEN = {*range(4, 9), *range(14, 18)}
"""Steps of the collapsing run in whose forward pass the router of block 2 knows two experts."""


@pytest.fixture(scope="module")
def mesh():
    torch.set_num_threads(1)
    mesh = world.start(RunConfig().parallel, device=select("cpu"))
    yield mesh
    world.stop(mesh)


def config(folder, **changes) -> RunConfig:
    guard = {"steps": 3} | changes.pop("guard", {})
    train = {"steps": STEPS, "validate_every": 10, "validate_samples": 4, "micro_batch": 8}
    return configure(folder, model={"ffn": FFN}, guards={"experts": guard}, train=train, checkpoint={"every": 0}, **changes)


def drive(engine) -> None:
    """In the steps of DRIVEN, block 2 sends every token to one of two experts, by the sign of a direction."""
    router = dict(engine.stages.parts[0].named_modules())["blocks.2.ffn.router"]
    direction = torch.randn(router.weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = router.weight.detach().clone()
    forward_backward = engine.forward_backward

    def driven(batches):
        with torch.no_grad():
            router.weight.copy_(before)
            if engine.steps_taken + 1 in DRIVEN:
                router.weight.zero_()
                router.weight[3], router.weight[5] = 100 * direction, -100 * direction
        return forward_backward(batches)

    engine.forward_backward = driven


def run(cfg, mesh, *, driven: bool, stop=None):
    engine = build("native", cfg, mesh)
    if driven:
        drive(engine)
    return loop("native", cfg, mesh, engine=engine, stop=stop)


def events(lines: list[dict]) -> list[tuple[int, str]]:
    return [(line["step"], line["text"]) for line in lines if line["kind"] == "event" and "experts" in line["text"]]


@pytest.fixture(scope="module")
def collapsed(mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collapsed")
    return folder / "run", run(config(folder), mesh, driven=True)[2]


@pytest.fixture(scope="module")
def healthy(mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    return folder / "run", run(config(folder), mesh, driven=False)[2]


def test_a_collapse_is_said_once_and_again_after_recovery(collapsed):
    found = events(collapsed[1])
    assert [step for step, _ in found] == [6, 11, 16], "after 3 steps beyond, 3 within, 3 beyond"
    assert all(text.startswith("experts of layer 2 ") for _, text in found), "the layers beside it are not named"
    entropy = float(re.search(r"for 3 steps .* entropy was below 0\.5 \(now ([\d.]+)\)", found[0][1])[1])
    assert 0 < entropy <= round(math.log(2) / math.log(8), 3)
    assert "set model.ffn.balance (a loss) or model.ffn.router.bias_rate" in found[0][1]
    assert found[1][1] == "experts of layer 2 are in balance again" and "collapse" in found[2][1]


def test_a_run_that_is_left_alone_says_nothing(healthy):
    assert events(healthy[1]) == []
    loads = [line["experts"]["load"] for line in healthy[1] if line["kind"] == "train"]
    assert len(loads) == STEPS and all(len(load) == 2 and 1 <= max(load) < 4.5 for load in loads)


def test_a_resumed_run_raises_the_alarm_when_one_that_never_stopped_does(collapsed, mesh, tmp_path):
    class StopAfterFive:
        asked = 0

        def should_stop(self):
            self.asked += 1
            return "SIGTERM" if self.asked == 5 else None

    code, _, _ = run(config(tmp_path), mesh, driven=True, stop=StopAfterFive())
    assert code == 2
    meta = json.loads((tmp_path / "run/checkpoints/step-00000005/meta.json").read_text())
    assert meta["experts"]["beyond"] == [0, 2]
    _, _, lines = run(config(tmp_path), mesh, driven=True)
    assert events(lines) == events(collapsed[1])
    assert "| 2 | " in write_report(tmp_path / "run", {}).read_text()


def test_a_run_can_be_ended_by_it(mesh, tmp_path):
    with pytest.raises(GuardStop, match="step 6: experts of layer 2 collapse"):
        run(config(tmp_path, guard={"action": "stop"}), mesh, driven=True)
    history = History.read(tmp_path / "run")
    assert history.steps == 6 and "collapse" in history.events[-1]["text"] and len(history.shares) == 1
    results = [StepResult(0.0, 1, metrics=line) for line in history.train]
    guards = {action: ExpertHealth(ExpertGuardConfig(action=action, steps=3), config(tmp_path).model) for action in ("warn", "off")}
    said = {action: [finding.stop for result in results for finding in guard.judge(result)] for action, guard in guards.items()}
    assert said == {"warn": [False], "off": []}


def test_shares_are_those_of_the_steps_between_lines(collapsed):
    lines = [line for line in collapsed[1] if line["kind"] == "experts"]
    assert [line["step"] for line in lines] == [10, 17] and all(line["first_layer"] == 1 for line in lines)
    for line in lines:
        assert len(line["shares"]) == 2 and all(sum(shares) == pytest.approx(1, abs=1e-5) for shares in line["shares"])
    steps = [line["experts"]["load"] for line in collapsed[1] if line["kind"] == "train"][10:]
    assert max(lines[1]["shares"][0]) * 8 <= max(load[0] for load in steps)
    driven = [at for at, share in enumerate(lines[1]["shares"][1]) if share > 1.5 / 8]
    assert {3, 5} <= set(driven), "two experts got the tokens of 4 of 7 steps"


def test_the_report_shows_layers_steps_and_experts(collapsed, healthy, monkeypatch):
    text = write_report(collapsed[0], {}).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    load, peak, entropy, fullest, idle = (cell.strip() for cell in row.split("|")[2:7])
    assert float(load) > 2.5 and int(peak.split("step ")[1].rstrip(")")) in DRIVEN and float(entropy) < 0.8
    assert fullest.split()[0] in "35" and idle.endswith(" of 8")
    assert "## Experts" in text and "dropped" not in text.split("## Experts")[1].split("##")[0]
    if "![load" in text:
        assert (collapsed[0] / "experts.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_report(collapsed[0], {}).read_text()
    _, two, scale = text.split("Load of each layer over the steps:")[1].split("```")[1].splitlines()[1:]
    assert two.startswith("2 ") and len(two) == 2 + STEPS and scale.startswith("from 1 to ")
    high = {step for step, bar in enumerate(two[2:], 1) if bar >= "▅"}
    assert high >= DRIVEN and not high & {1, 2, 3}
    assert not (collapsed[0] / "experts.png").exists()


def test_folders_without_experts_and_of_earlier_versions_still_have_a_report(collapsed, tmp_path):
    lines = [dict(line) for line in collapsed[1] if line["kind"] != "experts"]
    for line in lines[: len(lines) // 2]:
        line.pop("experts", None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    half = ExpertHistory.of(History.read(tmp_path))
    assert half.layers == 2 and 0 < len(half.steps) < STEPS and half.shares == []
    text = write_report(tmp_path, {}).read_text()
    assert "| layer | load | highest load | entropy |" in text
    for line in lines:
        line.pop("experts", None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "## Experts" not in write_report(tmp_path, {}).read_text() and not (tmp_path / "experts.png").exists()


def test_an_engine_that_counts_no_experts(mesh, tmp_path):
    cfg = config(tmp_path)
    code, _, lines = loop("table", cfg, mesh, engine=TableEngine(cfg, objective=lambda out: out["ce_sum"], mesh=mesh, discard=True))
    assert code == 0 and not [line for line in lines if line["kind"] == "experts"]


def test_the_worst_layer_is_on_the_line_and_every_layer_in_the_sinks(collapsed, tmp_path):
    line = next(line for line in collapsed[1] if line["kind"] == "train" and line["step"] == 6)
    load, entropy = line["experts"]["load"], line["experts"]["entropy"]
    shown = progress_line(step=6, total=STEPS, values=line, eta=None)
    assert f"load {max(load):.3g}  entropy {min(entropy):.3g}" in shown and "dropped" not in shown
    dropping = progress_line(step=6, total=STEPS, values={**line, "experts": {**line["experts"], "dropped": [0.25, 0.5]}}, eta=None)
    assert dropping.endswith("dropped 0.5")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for values in collapsed[1]:
        sink.write(values["step"], values)
    sink.close()
    board = EventAccumulator(str(tmp_path)).Reload()
    names = {name for name in board.Tags()["scalars"] if "experts" in name}
    assert names == {f"experts_{what}/{layer}" for what in ("load", "entropy") for layer in (1, 2)} | {
        "train/experts_load",
        "train/experts_entropy",
    }
    assert board.Scalars("experts_load/2")[5].value == pytest.approx(load[1]) and board.Scalars("experts_load/2")[5].step == 6


@pytest.mark.parametrize(
    ("experts", "top_k", "load", "entropy"),
    [(8, 2, 2.5, (1 + 1 / 3) / 2), (256, 8, 16.5, (1 + 3 / 8) / 2), (8, 1, 4.5, 0.5), (4, 4, 1.0, 1.0), (1, 1, 1.0, 0.5)],
)
def test_limits_stand_half_way_between_even_use_and_the_worst(experts, top_k, load, entropy):
    ffn = MoEConfig(kind="moe", experts=experts, top_k=top_k)
    assert limits(ExpertGuardConfig(), ffn) == pytest.approx((load, entropy))
    assert limits(ExpertGuardConfig(load=3.0, entropy=0.9), ffn) == (3.0, 0.9)


def test_what_to_change_goes_by_what_balances_already():
    def said(**options) -> str:
        return advice(MoEConfig(kind="moe", **options))

    assert said(balance={"weight": 0.01}) == "raise model.ffn.balance.weight (0.01) or lower the learning rate"
    assert "raise model.ffn.router.bias_rate (0.001)" in said(router={"bias_rate": 0.001})
    assert "lower model.ffn.router.bias_rate (5)" in said(router={"bias_rate": 5.0}), "scores differ by less than a step of the bias"
    assert "nothing balances them" in said(router={"bias_rate": 0.0})
