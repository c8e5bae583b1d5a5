"""Pairs of micro-batches of a pipeline, carried out in turns: what both halves do, in order, and what comes of it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from parity_rows import ACCUMULATE, MODELS
from sameness import BASE, Documents, build_engine, first_step, merge

from llmtrain.config.run import RunConfig
from llmtrain.layout.steps import StepPlan
from llmtrain.model.moe import MoE
from llmtrain.parallel import pipeline
from llmtrain.parallel.ops.in_flight import InFlight
from llmtrain.parallel.turns import together
from llmtrain.train.stream import micro_batches

MESH = {"pp": 2, "dp_shard": 2, "ep": 2, "virtual_stages": 2, "layers_per_stage": [1, 1, 1, 1]}


def steps(cases: dict[str, dict]) -> dict[str, dict]:
    """One step of each case (changes of `parallel` and `train`) by name: loss, gradients, and rank 0's events of each pair."""
    torch.set_num_threads(1)
    return {name: _step(changes) for name, changes in cases.items()}


def _step(changes: dict) -> dict:
    train = {option.partition(".")[2]: value for option, value in ACCUMULATE.items()}
    values = {"model": MODELS["MoE, 4 layers"], "precision": "fp64", "parallel": MESH, "train": train}
    cfg = RunConfig.model_validate(merge(merge(BASE, values), changes))
    engine = build_engine(cfg)
    mesh, step = engine.mesh, StepPlan.from_config(cfg).step(0)
    batches = micro_batches(step, Documents(), rank=mesh.data_rank, ranks=mesh.shape.dp)
    with recording(engine) as pairs:
        loss = engine.forward_backward(batches).loss
    found = {"loss": loss, "norm": engine.grad_norm(), "pairs": pairs} | first_step(engine, batches)
    mesh.leave()
    return found


@contextmanager
def recording(engine) -> Iterator[list[list[str]]]:
    """Events of every pair that runs in turns: F or B for the half, and what it does."""
    pairs, events, main = [], [], threading.get_ident()

    def note(what: str, *_: object) -> None:
        events.append(f"{'F' if threading.get_ident() == main else 'B'} {what}")

    def paired(first, second, *, beside) -> None:
        events.clear()
        together(first, second, beside=beside)
        pairs.append(list(events))

    def launched(launch, flight, rows, *, backward):
        note("sends")  # before it does: what follows is another's turn
        return launch(flight, rows, backward=backward)

    def finished(finish, flight):
        note("waits")
        return finish(flight)

    for part in engine.stages.parts.values():
        for block in part.blocks.values():
            assert isinstance(block.ffn, MoE)
            block.ffn.router.register_forward_hook(partial(note, "attention"))
            block.ffn.experts.register_forward_hook(partial(note, "experts"))
            block.ffn.experts.register_full_backward_hook(partial(note, "experts"))
            block.attention_norm.register_full_backward_hook(partial(note, "attention"))
    launch, finish = InFlight.launch, InFlight.finish
    with (
        patch.object(pipeline, "together", paired),
        patch.object(InFlight, "launch", lambda *args, **options: launched(launch, *args, **options)),
        patch.object(InFlight, "finish", lambda flight: finished(finish, flight)),
    ):
        yield pairs
