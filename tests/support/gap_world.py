"""Sweeps of `llmtrain gap` inside a world of ranks, on a tiny model with weights drawn from the seed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.device.dtypes import torch_dtype
from llmtrain.model import build
from llmtrain.ops import Call, Mask, resolve
from llmtrain.parallel import mesh as world
from llmtrain.stages import gap
from llmtrain.stages.results import full_weights
from llmtrain.stages.session import Session
from llmtrain.train.console import Console
from llmtrain.train.run_folder import RunFolder

MODEL = {
    "layers": 2,
    "hidden": 32,
    "max_seq_len": 128,
    "attention": {"heads": 4, "kv_heads": 2},
    "ffn": {"hidden": 48},
    "init": {"std": 0.2},
}


class Stop:
    """Stands for a signal that comes when the loop has asked so many times."""

    def __init__(self, after: int | None = None):
        self.after, self.asked = after, 0

    def should_stop(self):
        self.asked += 1
        return "SIGTERM" if self.after is not None and self.asked > self.after else None


def sweep_of(folder: str, values: dict, stop: Stop) -> gap.Sweep:
    """A sweep with its engine, on the mesh that `values` asks for, in a world that has as many ranks."""
    torch.set_num_threads(1)
    cfg = gap.settled(RunConfig.model_validate({"device": "cpu", "precision": "fp64", "model": MODEL | {"vocab_size": 300}} | values))
    device = select("cpu", int(os.environ.get("LOCAL_RANK", 0)))
    mesh = world.start(cfg.parallel, device=device)
    ops = resolve(cfg.kernels, Call(device="cpu", dtype=torch_dtype(cfg.precision.compute), documents=True, head_dim=8))
    Path(folder).mkdir(parents=True, exist_ok=True)
    session = Session(cfg, device, mesh, ops, RunFolder(Path(folder)), Console(enabled=False), "")
    return gap.Sweep(session, stop)


def sweeps(cases: list[tuple[str, dict, int | None]]) -> list[dict]:
    """Several sweeps (folder, configuration, when to stop), one after the other: exit code, results, weights at the end."""
    found = []
    for folder, values, after in cases:
        sweep = sweep_of(folder, values, Stop(after))
        code = sweep.run()
        sweep.base.restore(sweep.engine)
        restored = {name: whole.clone().numpy() for name, whole in full_weights(sweep.engine, sweep.s.mesh)}
        lines = [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]
        found.append({"code": code, "lines": lines, "restored": restored})
        sweep.s.mesh.leave()
    return found


def by_hand(folder: str, values: dict, steps: int) -> list[list[float]]:
    """Cross-entropies of the paper's loop in plain PyTorch, a list per text: torch's own Adam, told to maximise."""
    sweep = sweep_of(folder, values, Stop())
    cfg, mesh = sweep.cfg, sweep.s.mesh
    start = {name: whole.clone() for name, whole in full_weights(sweep.engine, mesh)}
    curves = []
    for text in sweep.texts:
        model = build(cfg.model, resolve({}, Call(device="cpu", dtype=torch.float64, head_dim=8)), None).double()
        model.load_state_dict(start)
        adam = torch.optim.Adam(model.parameters(), lr=5e-5, betas=(0.9, 0.98), maximize=True)
        ids = torch.tensor([text.tokens])
        curves.append([])
        for _ in range(steps):
            adam.zero_grad()
            logits = model(ids[:, :-1], mask=Mask())["logits"][0]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            curves[-1].append(loss.item())
            loss.backward()
            adam.step()
    mesh.leave()
    return curves


def exported(folder: str, values: dict) -> dict:
    """Losses of the chosen run's steps taken again, which must be those of the first time."""
    sweep = sweep_of(folder, values, Stop())
    code = sweep.run()
    sweep.cfg = sweep.cfg.model_copy(update={"checkpoint": sweep.cfg.checkpoint.model_copy(update={"export": "hf"})})
    sweep.s = replace(sweep.s, cfg=sweep.cfg)
    sweep.finish()
    report = (Path(folder) / "report.md").read_text()
    return {"code": code, "report": report, "files": sorted(path.name for path in (Path(folder) / "hf").iterdir())}
