"""What an engine gives beside its steps, on this world's mesh: calibration, logits, evaluation, and what is made once per micro-batch."""

import torch
from sameness import BASE, Documents, merge

import llmtrain.engine.native as native
from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.model.objective import cross_entropy
from llmtrain.model.rope import Rope
from llmtrain.ops import Call, Mask, resolve
from llmtrain.parallel import mesh as world

AUTO = {"precision": "fp64", "model": {"norm": {"placement": "depth_scaled_sandwich", "c_attention": "auto", "c_ffn": "auto"}}}


def calls(meshes: dict[str, dict]) -> dict[str, dict]:
    """Results by name of the mesh; rows of 13 tokens do not split evenly."""
    torch.set_num_threads(1)
    return {name: _calls(merge(BASE, AUTO | changes(parallel))) for name, parallel in meshes.items()}


def changes(parallel: dict) -> dict:
    """Options of a mesh; `attention` is that of `kernels`."""
    kernels = {"kernels": {"attention": parallel["attention"]}} if "attention" in parallel else {}
    return {"parallel": {key: value for key, value in parallel.items() if key != "attention"}} | kernels


def _calls(values: dict) -> dict:
    cfg, device = RunConfig.model_validate(values), select("cpu")
    mesh = world.start(cfg.parallel, device=device)
    ops = resolve(cfg.kernels, Call(device="cpu", dtype=torch.float64, documents=True, head_dim=8, heads=4, kv_heads=2))
    engine = native.build(cfg, objective=cross_entropy, mesh=mesh, device=device, ops=ops)
    measured = engine.calibrate(Documents().batch(0, 2))
    tokens = torch.arange(2 * 13).reshape(2, 13) % 61
    batches = [Documents().batch(first, 2) for first in range(2 * mesh.data_rank, 12, 2 * mesh.shape.dp)]
    found = {
        "measured": measured,
        "logits": engine.logits(tokens).numpy(),
        "evaluated": engine.evaluate(batches).loss,
        "made_once": mesh.gather(_made_once(engine, batches)),
    }
    mesh.leave()
    return found


def _made_once(engine, batches) -> dict:
    """How often a step of these micro-batches computes masks, rotations and what an attention op makes of a mask on this rank, and how many
    stages and blocks use them."""
    made = {"prepared": 0, "rotations": 0, "lowered": {}, "asked": {}, "stages": len(engine.stages.parts), "micro_batches": len(batches)}
    made["blocks"] = sum(len(part.blocks) for part in engine.stages.parts.values())
    prepare, forward, once = native.prepare, Rope.forward, Mask.once

    def counting(name, function):
        def call(*args, **kwargs):
            made[name] += 1
            return function(*args, **kwargs)

        return call

    def counted(mask, name, make):
        def making(mask):
            made["lowered"][name] = made["lowered"].get(name, 0) + 1
            return make(mask)

        made["asked"][name] = made["asked"].get(name, 0) + 1
        return once(mask, name, making)

    Mask.once = counted
    native.prepare, Rope.forward = counting("prepared", prepare), counting("rotations", forward)
    try:
        engine.forward_backward(batches)
        engine.discard()
    finally:
        native.prepare, Rope.forward, Mask.once = prepare, forward, once
    return made
