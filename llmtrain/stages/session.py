"""What every stage starts from and ends with: device, mesh, kernels, engine, run folder, sinks."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.config.run import RunConfig
from llmtrain.device import Device, select
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.base import ENGINES, Engine, check_capabilities, check_engine
from llmtrain.engine.deepspeed import build as _register_deepspeed  # noqa: F401
from llmtrain.engine.megatron import build as _register_megatron  # noqa: F401
from llmtrain.engine.native import build as _register_native  # noqa: F401
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.steps import StepPlan
from llmtrain.ops import Call, Ops, resolve
from llmtrain.parallel import mesh as world
from llmtrain.parallel.choices import choices
from llmtrain.parallel.compile import decide
from llmtrain.parallel.cores import settled
from llmtrain.parallel.hang.watch import watching
from llmtrain.train.console import Console
from llmtrain.train.run_folder import RunFolder, setup_logging


def op_call(cfg: RunConfig, device: Device) -> Call:
    """What the model will ask of its ops."""
    model = cfg.model
    return Call(
        device=device.kind,
        dtype=torch_dtype(cfg.precision.compute),
        capability=device.capability(),
        parameter_dtype=torch_dtype(cfg.precision.params),
        head_dim=model.head_dim,
        value_head_dim=model.value_head_dim,
        heads=model.attention.heads,
        kv_heads=model.kv_heads,
        documents=cfg.data.document_mask,
        window=model.attention.window,
        deterministic=cfg.train.deterministic,
        expert_widths=(model.ffn.descend or model.hidden, model.ffn.hidden // cfg.parallel.etp) if model.ffn.kind == "moe" else (),
    )


@dataclass
class Session:
    """A started world with everything a stage needs."""

    cfg: RunConfig
    device: Device
    mesh: world.Mesh
    ops: Ops
    folder: RunFolder
    console: Console
    cores: str
    """The processor cores and threads of the ranks, in words."""

    def build_engine(self, objective: Callable[[dict], torch.Tensor]) -> Engine:
        """The configured engine around `objective`; raises UserError for what it cannot run."""
        check_engine(self.cfg, shape=self.mesh.shape, device=self.device.kind)
        engine = ENGINES[self.cfg.engine.kind](self.cfg, objective=objective, mesh=self.mesh, device=self.device, ops=self.ops)
        check_capabilities(engine, self.cfg)
        return engine

    def introduce(self) -> None:
        """Say what was found and chosen: device, mesh, kernels with reasons."""
        kernels = ", ".join(f"{op} {choice.name}" for op, choice in self.ops.choices.items())
        self.console.message(f"device: {self.device.describe()}")
        self.console.message(f"cores: {self.cores}")
        self.console.message(f"mesh: {self.mesh.shape.describe()} ({self.mesh.device.collective_backend}), engine {self.cfg.engine.kind}")
        if self.cfg.parallel.hccl_buffer_mb is not None and self.mesh.device.collective_backend != "hccl":
            self.console.message(f"parallel.hccl_buffer_mb: not used, groups are {self.mesh.device.collective_backend}'s")
        if self.cfg.parallel.expert_placement is not None and self.mesh.shape.ep == 1:
            self.console.message("parallel.expert_placement: not used, every rank has all experts (parallel.ep 1)")
        if self.mesh.shape.pp > 1:
            self.console.message(f"pipeline: {self._pipeline()}")
        self.console.message(f"kernels: {kernels} (`llmtrain kernels` says why)")
        hardware = self.device.hardware()
        exchange = choices(self.cfg, self.mesh.shape, device=self.device.kind, hardware=hardware.key if hardware else None)
        if self.cfg.engine.kind == "native" and str(exchange):
            self.console.message(f"collectives: {exchange}")
        if self.cfg.engine.kind == "native":
            compiling = decide(self.cfg, kind=self.device.kind, ranks=self.mesh.world)
            wait = "; the first step of each sequence length takes half a minute or so longer" if compiling.on else ""
            self.console.message(f"compile: {compiling}{wait}")

    def _pipeline(self) -> str:
        segment = StepPlan.from_config(self.cfg).segments[0]
        micro_batches = segment.batch // (self.mesh.shape.dp * segment.phase.micro_batch)
        return PipelinePlan.from_config(self.cfg).describe(micro_batches)


def ranks_wanted(cfg: RunConfig) -> int:
    """Local ranks that the plain command has to start: the mesh's product; dp_shard -1 takes every local accelerator.

    Raises UserError for an engine that does not run `cfg` on them.
    """
    shape, device = MeshShape.from_config(cfg.parallel), select(cfg.device)
    if cfg.parallel.dp_shard == -1:
        shape = MeshShape.from_config(cfg.parallel, world=max(shape.world, device.count()))
    check_engine(cfg, shape=shape, device=device.kind)
    return shape.world


@contextmanager
def session(cfg: RunConfig) -> Iterator[Session]:
    """Join the world, open the run folder, choose kernels; leave it all in order at the end."""
    device = select(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    device.set_current()
    if cfg.train.deterministic:
        device.deterministic(True)
    reason = device.unsupported_dtype(torch_dtype(cfg.precision.compute))
    if reason:
        raise UserError(f"precision.compute {cfg.precision.compute}: {reason}")
    mesh = world.start(cfg.parallel, device=device)
    try:
        path = Path(cfg.output) / cfg.name / "log" / "hang.txt"
        watched = watching(mesh, timeout=cfg.parallel.timeout, path=path, report=cfg.guards.hang_report)
        with watched, settled(cfg.parallel, mesh=mesh) as cores, RunFolder.create(cfg) as folder:
            setup_logging(folder.path, mesh.rank)
            ops = resolve(cfg.kernels, op_call(cfg, device))
            console = Console(enabled=mesh.rank == 0)
            try:
                yield Session(cfg, device, mesh, ops, folder, console, cores)
                mesh.meet()
            finally:
                console.close()
    finally:
        world.stop(mesh)
