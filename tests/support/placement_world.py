"""Experts that move between the ranks of this world while they train, beside runs in which they stay."""

import random
from pathlib import Path

import numpy as np
import torch
from checkpoint_world import Run
from engine_gradients import full
from parity_rows import MODELS, Row

from llmtrain.config.train import CheckpointConfig
from llmtrain.layout.placement import Plan, home
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.placement import canonical
from llmtrain.train.checkpoint import Checkpointer

MODELS |= {
    "MoE of 6": {"ffn": {"kind": "moe", "experts": 6, "top_k": 2, "hidden": 16, "capacity": {"factor": 1.0}}},
    "MoE, skewed": {"ffn": {"kind": "moe", "experts": 4, "top_k": 1, "hidden": 16, "router": {"score": "sigmoid", "bias_rate": 0.0}}},
}
STEPS, SAVED = 6, 4
PLACEMENT = {"every": 2, "ema": 0.9, "gain": 0.0}


def started(row: Row, *, moving: str | None) -> Run:
    """A run of `row`; `moving` is `planned`, or `forced`: every second step all experts of all layers get other slots by lot."""
    run = Run(with_placement(row, moving is not None))
    if moving == "forced":
        force(run.engine.placement.planner)
    return run


def with_placement(row: Row, on: bool) -> Row:
    return Row(row.parallel, row.model, row.options | ({"parallel.expert_placement": PLACEMENT} if on else {}), row.whole)


def force(planner) -> None:
    def check() -> dict[int, Plan]:
        seen = planner.state()["seen"]
        if not seen or seen % PLACEMENT["every"]:
            return {}
        for layer, slots in enumerate(planner.slots):
            planner.slots[layer] = random.Random(100 * seen + layer).sample(slots, len(slots))
        return {layer: Plan(slots, 1.0, 0.5) for layer, slots in enumerate(planner.slots)}

    planner.check = check


def stacks(run: Run) -> dict[str, np.ndarray]:
    """The experts' weights and moments of all ranks, in the order in which they stand."""
    engine, found = run.engine, {}
    for name, parameter in engine.parameters.items():
        if ".experts." in name:
            parts = local_tensor(parameter.detach()), *engine.optimizer.moments[name]
            found |= {f"{name}.{at}": full(canonical(parameter, part, run.mesh)).clone().numpy() for at, part in enumerate(parts)}
    return found


def moved_home_and_back(run: Run) -> dict:
    """Whether every slot holds what its expert has at home, and how many experts are elsewhere."""
    standing, layers = [list(slots) for slots in run.engine.placement._standing], run.engine.stages.usage.modules
    before = stacks(run)
    run.engine.state()
    at_home, same = stacks(run), []
    for number, (name, _) in layers.items():
        keys = [key for key in before if key.startswith(f"{name}.")]
        same += [np.array_equal(before[key][standing[number]], at_home[key]) for key in keys]
    assert run.engine.placement._standing == [home(len(slots)) for slots in standing]
    away = sum(slot != expert for slots in standing for expert, slot in enumerate(slots))
    return {"same": same, "away": away, "tables": [layer.table.tolist() for layer in run.engine.placement._layers.values()]}


def train(row: Row, *, moving: str | None = None, folder: str | None = None, steps: int = STEPS) -> dict:
    """So many steps; `folder` gets a checkpoint after SAVED of them. The state after all, and what the moves did."""
    run = started(row, moving=moving)
    losses, found = run.steps(SAVED), {}
    run.engine.evaluate([run.data.batch(0, 2)])  # leaves gathered copies of weights behind
    if moving:
        found["moved"] = moved_home_and_back(run)
    if folder is not None:
        checkpointer = Checkpointer(Path(folder), CheckpointConfig(), timeout=60)
        meta = {"step": SAVED, "position": SAVED * 8, "engine": run.engine.extra_state()}
        state = run.engine.state()
        checkpointer.save(SAVED, state, meta)
        found["saved"] = run.whole_state()
        checkpointer.wait()
        assert checkpointer.failed is None, checkpointer.failed
    losses += run.steps(steps - SAVED)
    found |= {"losses": losses, "state": run.whole_state()}
    run.mesh.leave()
    return found


def resume(row: Row, *, folder: str, moving: str | None = None) -> dict:
    """From the checkpoint in `folder` to STEPS: the state as loaded and in the end, and the losses."""
    run = started(row, moving=moving)
    checkpointer = Checkpointer(Path(folder), CheckpointConfig(), timeout=60, writable=False)
    state = run.engine.state()
    meta = checkpointer.load(checkpointer.newest(), state)
    run.engine.load_state(state)
    run.engine.load_extra_state(meta["engine"])
    run.next_step = meta["step"]
    loaded = run.whole_state()
    found = {"loaded": loaded, "losses": run.steps(STEPS - SAVED), "state": run.whole_state()}
    run.mesh.leave()
    return found


def planned(row: Row) -> dict:
    """Steps of a model whose first two experts get most tokens: by step the fullest rank's tokens over the mean, events, seconds."""
    run = started(row, moving="planned")
    with torch.no_grad():
        for router in (layer.router for _, layer in run.engine.stages.usage.modules.values()):
            router.bias[:2] = 0.3
    results = []
    step = run.engine.forward_backward

    def kept(batches):
        results.append(step(batches))
        return results[-1]

    run.engine.forward_backward = kept
    run.steps(STEPS)
    run.mesh.leave()
    return {
        "rank_load": [result.metrics["experts"]["rank_load"] for result in results],
        "events": [result.events for result in results],
        "seconds": [result.metrics.get("move_seconds", 0.0) for result in results],
        "slots": run.engine.placement.planner.slots,
    }


def refused(row: Row) -> str:
    """What is said when experts are to move while there are gradients."""
    run = started(row, moving="forced")
    run.steps(3)
    batch = run.data.batch(0, 8 // run.mesh.shape.dp)
    run.engine.forward_backward([batch])
    try:
        run.engine.state()
    except RuntimeError as error:
        return str(error)
    finally:
        run.engine.discard()
        run.mesh.leave()
    return "nothing"


def run_all(cases: dict[str, dict]) -> dict[str, object]:
    """Each case by its function in this module, in order."""
    return {name: globals()[case.pop("do")](**case) for name, case in cases.items()}
