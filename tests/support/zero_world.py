"""Engine deepspeed in real worlds: state that comes and goes, steps that are given up, runs that change engines."""

import math
from pathlib import Path

import numpy as np
import torch
from engine_gradients import full
from sameness import BASE, Documents, build_engine, merge

from llmtrain.config.run import RunConfig
from llmtrain.config.train import CheckpointConfig
from llmtrain.data.batch import Batch
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.stages.results import full_weights
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.stream import micro_batches

EVERY_PARAMETER = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Has ZeRO 3 partition small parameters too."""


class Run:
    """An engine of the parity runs' model on this world's mesh."""

    def __init__(self, changes: dict):
        torch.set_num_threads(1)
        cfg = RunConfig.model_validate(merge(BASE, changes))
        self.engine, self.plan = build_engine(cfg), StepPlan.from_config(cfg)

    def batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        mesh = self.engine.mesh
        return micro_batches(self.plan.step(index), Documents(), rank=mesh.data_rank, ranks=mesh.shape.dp)

    def step(self, index: int) -> tuple[float, float]:
        """Take a step: its loss and gradient norm."""
        result = self.engine.forward_backward(self.batches(index))
        norm = self.engine.grad_norm()
        self.engine.apply(lr=self.plan.step(index).lr)
        return result.loss, norm

    def whole(self) -> dict[str, np.ndarray]:
        """The canonical state, every tensor whole."""
        return {name: full(tensor).detach().numpy().copy() for name, tensor in self.engine.state().items()}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two states are equal to the last bit, signs of zeros included."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def leg(changes: dict, folder: str, start: int, steps: int, *, minus_zero: bool = False) -> dict:
    """A part of a run: go on from the newest checkpoint in `folder`, if any, and save again. Losses, norms, the state loaded and saved.

    minus_zero: save a moment with a zero that has a sign.
    """
    run = Run(changes)
    checkpointer = Checkpointer(Path(folder), CheckpointConfig(asynchronous=False), log=lambda text: None)
    loaded = None
    if (path := checkpointer.newest()) is not None:
        state = run.engine.state()
        checkpointer.load(path, state)
        run.engine.load_state(state)
        loaded = run.whole()
    figures = [run.step(index) for index in range(start, start + steps)]
    state = run.engine.state()
    if minus_zero:
        local_tensor(state["final_norm.weight.exp_avg"])[:1] = -0.0
    saved = {name: full(tensor).detach().numpy().copy() for name, tensor in state.items()}
    checkpointer.save(start + steps, state, {})
    assert checkpointer.failed is None, checkpointer.failed
    return {"losses": [loss for loss, _ in figures], "norms": [norm for _, norm in figures], "loaded": loaded, "saved": saved}


def given_up(cases: dict[str, dict]) -> dict[str, dict]:
    """Two steps with one between them that is discarded, and one whose gradients are NaN, beside a run of the two steps alone."""
    return {name: _given_up(changes) for name, changes in cases.items()}


def _given_up(changes: dict) -> dict:
    run, other = Run(changes), Run(changes)
    first, before = run.step(0), run.whole()
    run.engine.forward_backward(run.batches(5))
    run.engine.discard()
    unchanged = same_bits(run.whole(), before)
    objective = run.engine.objective
    run.engine.objective = lambda outputs: objective(outputs) * math.nan
    run.engine.forward_backward(run.batches(6))
    norm = run.engine.grad_norm()
    run.engine.discard()
    run.engine.objective = objective
    found = [first, run.step(1)], [other.step(0), other.step(1)]
    return {"unchanged": unchanged, "nan": math.isnan(norm), "figures": found, "same": same_bits(run.whole(), other.whole())}


def scaled(cases: dict[str, dict], steps: int) -> dict[str, dict]:
    """Steps in fp16 as the loop takes them. DeepSpeed is told that this CPU has fp16: it asks oneDNN, while torch computes it anywhere."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    return {name: _scaled(changes, steps) for name, changes in cases.items()}


def _scaled(changes: dict, steps: int) -> dict:
    """By step: the loss, the norm or None where it overflowed, the scale of the step, and whether an overflow left the state alone."""
    run, found = Run(changes), {"losses": [], "norms": [], "scales": [], "alone": []}
    for index in range(steps):
        found["scales"].append(run.engine.extra_state()["loss_scale"]["value"])
        found["losses"].append(run.engine.forward_backward(run.batches(index)).loss)
        lost = run.engine.overflowed()
        found["norms"].append(None if lost else run.engine.grad_norm())
        if lost:
            before = run.whole()
            run.engine.discard()
            found["alone"].append(same_bits(run.whole(), before))
        else:
            run.engine.apply(lr=run.plan.step(index).lr)
    return found | {"taken": run.engine.steps_taken}


def evaluated(cases: dict[str, dict]) -> dict[str, dict]:
    """After a step: validation loss, logits and the weights as they are exported; then the loss and norm of another step."""
    found = {}
    for name, changes in cases.items():
        run = Run(changes)
        run.step(0)
        loss = run.engine.evaluate(run.batches(1)).loss
        logits = run.engine.logits(torch.arange(12).view(2, 6)).float().numpy()
        weights = {name: tensor.numpy().copy() for name, tensor in full_weights(run.engine, run.engine.mesh)}
        found[name] = {"loss": loss, "logits": logits, "weights": weights, "next": run.step(1)}
    return found


def measured(cases: dict[str, dict]) -> dict[str, dict]:
    """What is left to `auto` measured before the first step, and the state that it leaves."""
    found = {}
    for name, changes in cases.items():
        run = Run(changes)
        values = run.engine.calibrate(Documents().batch(0, 2))
        found[name] = {"values": values, "state": run.whole(), "step": run.step(0)}
    return found
