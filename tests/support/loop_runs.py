"""Runs of the loop in this process, on one rank, with an engine that a test may tamper with."""

import json

import torch
from fake_engine import TableEngine
from sameness import BASE, Documents, merge

from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.engine.native import build as build_native
from llmtrain.layout.steps import StepPlan
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import Call, resolve
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.console import Console
from llmtrain.train.loop import Inputs, Loop
from llmtrain.train.metrics import JsonlSink
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.stopping import StopRequest


def configure(tmp_path, **changes) -> RunConfig:
    """Six steps of a tiny model in float64, validated every 3 and saved every 2."""
    own = {"name": "run", "output": str(tmp_path), "precision": "fp64", "train": {"steps": 6, "validate_every": 3, "validate_samples": 5}}
    own["checkpoint"] = {"every": 2, "asynchronous": False}
    return RunConfig.model_validate(merge(merge(BASE, own), changes))


def build(kind: str, cfg: RunConfig, mesh):
    """The engine `native`, or `table`, which shares no code with it."""
    if kind == "table":
        return TableEngine(cfg, objective=cross_entropy, mesh=mesh, discard=True)
    ops = resolve({}, Call(device="cpu", dtype=torch.float64, documents=True, head_dim=8, heads=4, kv_heads=2))
    return build_native(cfg, objective=cross_entropy, mesh=mesh, device=select("cpu"), ops=ops)


def loop(kind: str, cfg: RunConfig, mesh, *, stop=None, engine=None) -> tuple[int, Loop, list[dict]]:
    """Run `cfg` in its run folder, or go on there: exit code, the loop, all lines of metrics."""
    engine = engine or build(kind, cfg, mesh)
    with RunFolder.create(cfg) as folder, StopRequest(cfg.guards) as request:
        sink = JsonlSink(folder.metrics)
        data = Documents()
        short = Documents()
        short.__class__ = type("Short", (Documents,), {"__len__": lambda self: 5})
        run = Loop(
            cfg,
            engine=engine,
            plan=StepPlan.from_config(cfg),
            inputs=Inputs(dataset_of=lambda phase: data, validation={"held-out": short}),
            mesh=mesh,
            device=select("cpu"),
            folder=folder,
            checkpointer=Checkpointer(folder.path, cfg.checkpoint, log=lambda text: None),
            sinks=[sink],
            console=Console(enabled=False),
        )
        try:
            code = run.run(stop or request)
        finally:
            sink.close()
        return code, run, [json.loads(line) for line in folder.metrics.read_text().splitlines()]
