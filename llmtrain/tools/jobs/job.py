"""What a job file is written from, checked against the mesh before anything is written."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.tools.jobs.environment import Variable, environment

DEVICES = ("cpu", "cuda", "npu")


@dataclass(frozen=True)
class Job:
    """One run on `nodes` machines with `per_node` ranks each, a device to every rank.

    words: what follows the verb on the command line of every rank. workdir: the folder that all nodes share.
    """

    cfg: RunConfig
    name: str
    device: str
    nodes: int
    per_node: int
    verb: str
    words: tuple[str, ...]
    workdir: Path
    interface: str | None = None
    port: int = 29500
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.per_node

    @property
    def command(self) -> str:
        """`llmtrain train -c FILE ...` as a shell takes it, without what starts Python."""
        return shlex.join(["llmtrain", self.verb, *self.words])

    @property
    def shape(self) -> MeshShape:
        """The mesh that the ranks form."""
        return MeshShape.from_config(self.cfg.parallel, world=self.ranks, local=self.per_node)

    @property
    def logs(self) -> str:
        """Folder for logs of libraries, beside the run's own."""
        return str(self.workdir / self.cfg.output / self.cfg.name / "log")

    def environment(self) -> list[Variable]:
        """The variables that every rank needs, with reasons."""
        return environment(self.cfg, device=self.device, shape=self.shape, interface=self.interface, logs=self.logs)

    def headline(self) -> str:
        """`2 nodes x 8 npu = 16 ranks: dp_shard 2 x tp 8`."""
        nodes = f"{self.nodes} node{'s' if self.nodes > 1 else ''}"
        return f"{nodes} x {self.per_node} {self.device} = {self.ranks} rank{'s' if self.ranks > 1 else ''}: {self.shape.describe()}"


def check(job: Job) -> None:
    """Refuse a mesh that the ranks do not form, or model and batches that do not fit it; note what cannot be known here.

    Raises UserError with the arithmetic and the option to change.
    """
    from llmtrain.parallel.check import check_parallel
    from llmtrain.stages.pretrain import with_vocabulary

    if min(job.nodes, job.per_node) < 1:
        raise UserError(f"--nodes {job.nodes} --per-node {job.per_node}: both must be at least 1")
    cfg, tokenizer = job.cfg, job.cfg.tokenizer.path
    if cfg.model.vocab_size is None and tokenizer is not None and not Path(tokenizer).exists():
        job.notes.append(f"tokenizer.path {tokenizer} is not on this machine: whether its vocabulary fits the mesh was not checked")
    else:
        cfg = with_vocabulary(cfg)
    check_parallel(cfg, job.shape, StepPlan.from_config(cfg), device=job.device)
    if job.shape.tp > job.per_node:
        job.notes.append(f"parallel.tp {job.shape.tp} exceeds the {job.per_node} ranks of a node: every layer will wait for the network")
    for path in _relative_paths(job.cfg):
        job.notes.append(f"{path} is a relative path: it is looked for below {job.workdir} on every node")


def _relative_paths(cfg: RunConfig) -> list[str]:
    named = {"output": cfg.output, "tokenizer.path": cfg.tokenizer.path}
    return [f"{option} {path}" for option, path in named.items() if path is not None and not Path(path).is_absolute()]
