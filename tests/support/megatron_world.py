"""The runs of `sameness` under the engine megatron, on the CPU: for ranks of worlds, whose torch it changes."""

import importlib
import os
from contextlib import nullcontext

import torch
from sameness import BASE, Documents, merge

from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.device.dtypes import torch_dtype
from llmtrain.layout.steps import StepPlan
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import Call, resolve
from llmtrain.parallel import mesh as world
from llmtrain.train.stream import micro_batches


def start(changes: dict):
    """The engine of `changes` over sameness.BASE in this world."""
    torch.set_num_threads(1)
    cfg = RunConfig.model_validate(merge(BASE, changes))
    if cfg.engine.kind == "megatron":
        importlib.import_module("megatron_cpu")  # before megatron, and in this process alone
    from llmtrain.engine import megatron, native

    device = select("cpu", int(os.environ.get("LOCAL_RANK", 0)))
    mesh = world.start(cfg.parallel, device=device)
    call = Call(device="cpu", dtype=torch_dtype(cfg.precision.compute), documents=True, head_dim=8, heads=4, kv_heads=2)
    build = megatron.build if cfg.engine.kind == "megatron" else native.build
    return build(cfg, objective=cross_entropy, mesh=mesh, device=device, ops=resolve(cfg.kernels, call))


def whole(tensors: dict[str, torch.Tensor], mesh) -> dict[str, torch.Tensor]:
    """Every rank's tensors, whole, from all stages of a pipeline."""
    full = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()}
    return {name: value for part in mesh.gather(full) for name, value in part.items()}


def train(changes: dict, *, whole_rows: bool = False, stop: int | None = None, fault: str | None = None) -> dict:
    """Losses, gradient norms and metrics of every step, the gradients of step 1 and the state after step 2, as `sameness.train` gives them,
    and whether logits of the ranks agree with each other. fault: one of `megatron_faults`."""
    with importlib.import_module("megatron_faults").marks(fault) if fault else nullcontext():
        engine = start(changes | {"engine": "megatron"})
    plan, mesh, data = StepPlan.from_config(engine.cfg), engine.mesh, Documents(whole=whole_rows)
    losses, norms, metrics, found = [], [], [], {}
    for index in range(stop or plan.steps):
        step = plan.step(index)
        batches = micro_batches(step, data, rank=mesh.data_rank, ranks=mesh.shape.dp)
        result = engine.forward_backward(batches)
        if index == 0:
            gradients = whole(engine.gradients(), mesh)
            found["gradients"] = {name: tensor.double().numpy() for name, tensor in gradients.items()}
            found["choices"] = None if result.expert_counts is None else result.expert_counts.tolist()
        norms.append(engine.grad_norm())
        engine.apply(lr=step.lr)
        losses.append(result.loss)
        metrics.append(result.metrics)
        if index == 1:
            found["state"] = {name: tensor.numpy() for name, tensor in whole(engine.state(), mesh).items()}
    found["validation"] = engine.evaluate(batches).loss
    logits = engine.logits(data.batch(0, 2).tokens)
    found["logits"], found["agree"] = logits.float().numpy(), all(torch.equal(logits, other) for other in mesh.gather(logits))
    world.stop(mesh)
    return {"losses": losses, "norms": norms, "metrics": metrics} | found


def train_all(scenarios: dict[str, dict]) -> dict[str, dict]:
    """Several runs in one world, by name."""
    runs = {}
    for name, scenario in scenarios.items():
        scenario = dict(scenario)
        runs[name] = train(scenario.pop("changes"), whole_rows=scenario.pop("whole"), **scenario)
    return runs


def carry(changes: dict, *, source: str | None, target: str | None, first: int = 0, steps: int = 0) -> dict:
    """Losses of `steps` steps from step `first` on, under the engine that `changes` names, from the checkpoint in the folder `source` if
    given, saved to the folder `target` if given; and the whole state before and after them."""
    from pathlib import Path

    from llmtrain.config.train import CheckpointConfig
    from llmtrain.train.checkpoint import Checkpointer

    engine = start(changes)
    plan, mesh, losses = StepPlan.from_config(engine.cfg), engine.mesh, []
    if source is not None:
        state, reader = engine.state(), Checkpointer(Path(source), CheckpointConfig(), writable=False)
        meta = reader.load(reader.newest(), state)
        engine.load_state(state)
        engine.load_extra_state(meta["engine"])
    before = whole(engine.state(), mesh)
    for index in range(first, first + steps):
        step = plan.step(index)
        losses.append(engine.forward_backward(micro_batches(step, Documents(), rank=mesh.data_rank, ranks=mesh.shape.dp)).loss)
        engine.apply(lr=step.lr)
    after = whole(engine.state(), mesh)
    if target is not None:
        writer = Checkpointer(Path(target), CheckpointConfig(asynchronous=False))
        writer.save(first + steps, engine.state(), {"step": first + steps, "engine": engine.extra_state()})
        assert writer.failed is None
    world.stop(mesh)
    return {
        "losses": losses,
        **{name: {key: t.numpy() for key, t in part.items()} for name, part in (("before", before), ("after", after))},
    }


def carry_all(cases: list[dict]) -> list[dict]:
    """Several parts of runs in one world, one after the other."""
    return [carry(**case) for case in cases]


def ascend(cases: list) -> list[dict]:
    """Sweeps of gradient ascent as `gap_world.sweeps` makes them."""
    importlib.import_module("megatron_cpu")
    return importlib.import_module("gap_world").sweeps(cases)
