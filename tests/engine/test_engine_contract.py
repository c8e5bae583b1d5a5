"""The loop drives any engine through the interface alone: the native one and a second one that shares no code with it."""

import math

import pytest
from fake_engine import TableEngine
from loop_runs import build, configure, loop

from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.engine.base import check_capabilities
from llmtrain.errors import UserError
from llmtrain.model.objective import cross_entropy
from llmtrain.parallel import mesh as world
from llmtrain.train.guards import GuardStop

ENGINES = ("native", "table")


@pytest.fixture
def mesh():
    mesh = world.start(RunConfig().parallel, device=select("cpu"))
    yield mesh
    world.stop(mesh)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_loop_runs_it(kind, tmp_path, mesh):
    code, run, lines = loop(kind, configure(tmp_path), mesh)
    train = [line for line in lines if line["kind"] == "train"]
    assert code == 0 and [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert train[0]["loss"] == pytest.approx(math.log(61), rel=0.2)
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert run.engine.steps_taken == 6
    assert train[2]["samples"] == [16, 8] and train[2]["tokens"] == 3 * 8 * 24
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stopped_run_goes_on_bit_for_bit(kind, tmp_path, mesh):
    whole = loop(kind, configure(tmp_path, name="whole"), mesh)[2]

    class StopAfterFour:
        asked = 0

        def should_stop(self):
            self.asked += 1
            return "SIGTERM" if self.asked == 4 else None

    code, run, _ = loop(kind, configure(tmp_path), mesh, stop=StopAfterFour())
    assert code == 2 and run.next_step == 4
    code, _, lines = loop(kind, configure(tmp_path), mesh)
    assert code == 0

    def losses(of):
        return [(line["step"], line["loss"], line.get("grad_norm")) for line in of if line["kind"] != "event"]

    assert losses(lines) == losses(whole)


def test_a_changed_batch_is_refused_on_resume(tmp_path, mesh):
    loop("table", configure(tmp_path), mesh)
    with pytest.raises(UserError, match=r"stands at step 6 and sample 48, but this configuration's step 6 starts at sample 24"):
        loop("table", configure(tmp_path, train={"steps": 9, "global_batch": 4}), mesh)
    with pytest.raises(UserError, match=r"is at step 6, the run ends at step 3"):
        loop("table", configure(tmp_path, train={"steps": 3}), mesh)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_nan_never_reaches_the_weights(kind, action, tmp_path, mesh):
    cfg = configure(tmp_path, guards={"non_finite": action}, train={"steps": 4})
    engine = build(kind, cfg, mesh)
    forward = engine.forward_backward

    parameter = next(iter(engine.parameters.values())) if kind == "native" else engine.table

    def poison(parameter):
        parameter.grad.view(-1)[0] = math.nan

    def poisoned(batches):
        hooks = [parameter.register_post_accumulate_grad_hook(poison)] if 8 in batches[0].samples else []
        result = forward(batches)
        for hook in hooks:
            hook.remove()
        return result

    engine.forward_backward = poisoned
    if action == "stop":
        with pytest.raises(GuardStop, match=r"step 2: gradient norm is nan.*samples are 8 to 15"):
            loop(kind, cfg, mesh, engine=engine)
        assert engine.steps_taken == 1
    else:
        code, _, lines = loop(kind, cfg, mesh, engine=engine)
        assert code == 0 and engine.steps_taken == 3
        assert [line["skipped"] for line in lines if line["kind"] == "train"] == [0, 1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in engine.state().values())


def test_a_nan_loss_names_its_samples(tmp_path, mesh):
    cfg = configure(tmp_path, train={"steps": 4})
    engine = build("native", cfg, mesh)
    objective = engine.objective
    calls = []

    def poisoned(outputs):
        calls.append(1)
        return objective(outputs) * (math.nan if len(calls) == 6 else 1)

    engine.objective = poisoned
    with pytest.raises(GuardStop, match=r"step 2: loss is nan.*, from samples 10, 11") as stop:
        loop("native", cfg, mesh, engine=engine)
    assert stop.value.samples == (10, 11)


def test_what_an_engine_cannot_do_is_refused(tmp_path, mesh):
    engine = TableEngine(configure(tmp_path), objective=cross_entropy, mesh=mesh, discard=False)
    with pytest.raises(UserError, match=r"parallel\.tp is 2.*runs only dp_replicate"):
        check_capabilities(engine, configure(tmp_path, parallel={"tp": 2}))
    with pytest.raises(UserError, match=r"precision\.compute bf16"):
        check_capabilities(engine, RunConfig(precision="bf16"))
    with pytest.raises(UserError, match=r"cannot discard"):
        check_capabilities(engine, configure(tmp_path, guards={"non_finite": "skip"}))


def test_canonical_state_has_three_tensors_a_parameter(tmp_path, mesh):
    engine = build("native", configure(tmp_path), mesh)
    state = engine.state()
    names = set(engine.parameters)
    assert set(state) == {"step"} | {f"{n}.{part}" for n in names for part in ("weight", "exp_avg", "exp_avg_sq")}
    assert "blocks.0.attention.q_proj.weight" in names
