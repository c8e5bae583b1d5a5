"""Engine deepspeed in real worlds: state that comes and goes, steps that are given up, runs that change engines."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sameness import BASE, Documents, build_engine, merge

from llmtrain.config.run import RunConfig
from llmtrain.config.train import CheckpointConfig
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.stages.results import full_weights
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.stream import micro_batches

EVERY_PARAMETER = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Has ZeRO 3 partition small parameters too."""


def of(changes: dict) -> tuple[Any, StepPlan]:
    """An engine of the parity runs' model, and its plan."""
    torch.set_num_threads(1)
    cfg = RunConfig.model_validate(merge(BASE, changes))
    return build_engine(cfg), StepPlan.from_config(cfg)


def step(engine: Any, plan: StepPlan, index: int) -> tuple[float, float]:
    """Take a step: its loss and gradient norm."""
    at = plan.step(index)
    result = engine.forward_backward(micro_batches(at, Documents(), rank=engine.mesh.data_rank, ranks=engine.mesh.shape.dp))
    norm = engine.grad_norm()
    engine.apply(lr=at.lr)
    return result.loss, norm


def whole(engine: Any) -> dict[str, np.ndarray]:
    """The canonical state, every tensor whole, as its bits."""

    def full(tensor: torch.Tensor) -> np.ndarray:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).numpy().copy()

    return {name: full(tensor) for name, tensor in engine.state().items()}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two states are equal to the last bit, signs of zeros included."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def passed_on(leg: dict, folder: str, steps: int, start: int = 0) -> dict:
    """Go on from the newest checkpoint in `folder`, if any, for `steps` steps and save: losses, norms, the state loaded and the one saved."""
    engine, plan = of(leg)
    checkpointer = Checkpointer(Path(folder), CheckpointConfig(asynchronous=False), log=lambda text: None)
    loaded = None
    if (path := checkpointer.newest()) is not None:
        state = engine.state()
        checkpointer.load(path, state)
        engine.load_state(state)
        loaded = whole(engine)
    figures = [step(engine, plan, index) for index in range(start, start + steps)]
    checkpointer.save(start + steps, engine.state(), {})
    assert checkpointer.failed is None, checkpointer.failed
    saved = whole(engine)
    engine.mesh.leave()
    return {"losses": [loss for loss, _ in figures], "norms": [norm for _, norm in figures], "loaded": loaded, "saved": saved}


def given_up(changes: dict) -> dict:
    """Two steps with one between them that is discarded: against the same without it, states and losses; a NaN is among its gradients."""
    engine, plan = of(changes)
    other, _ = of(changes)
    first, discarded = step(engine, plan, 0), plan.step(5)
    batches = micro_batches(discarded, Documents(), rank=engine.mesh.data_rank, ranks=engine.mesh.shape.dp)
    before = whole(engine)
    engine.forward_backward(batches)
    engine.discard()
    unchanged = same_bits(whole(engine), before)
    parameter = next(iter(engine.parameters.values()))
    objective, engine.objective = engine.objective, lambda outputs: engine_nan(outputs, objective)
    engine.forward_backward(batches)
    poisoned = engine.grad_norm()
    engine.discard()
    engine.objective = objective
    second = step(engine, plan, 1)
    there = [step(other, plan, index) for index in range(2)]
    found = same_bits(whole(engine), whole(other)) and unchanged and math.isnan(poisoned)
    engine.mesh.leave()
    return {"same": found, "figures": ([first, second], there), "parameter": tuple(parameter.shape)}


def engine_nan(outputs: dict, objective: Any) -> torch.Tensor:
    """An objective that spoils the gradients."""
    return objective(outputs) * math.nan


def evaluated(changes: dict) -> dict:
    """Validation loss and logits of an engine after a step, and its weights as they would be exported."""
    engine, plan = of(changes)
    step(engine, plan, 0)
    batches = micro_batches(plan.step(1), Documents(), rank=engine.mesh.data_rank, ranks=engine.mesh.shape.dp)
    loss = engine.evaluate(batches).loss
    logits = engine.logits(torch.arange(12).view(2, 6)).float().numpy()
    again, norm = step(engine, plan, 1)
    weights = {name: tensor.numpy() for name, tensor in full_weights(engine, engine.mesh)}
    engine.mesh.leave()
    return {"loss": loss, "logits": logits, "again": (again, norm), "weights": weights, "ranks": local_tensor(torch.ones(1)).numel()}
