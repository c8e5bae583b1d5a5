"""What the ranks of a real world hand to their process groups in optimizer steps of the real loop, counted below torch.distributed."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from sameness import BASE, Documents, merge
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.engine.native import build
from llmtrain.layout.shards import Shards
from llmtrain.layout.steps import StepPlan
from llmtrain.layout.traffic import sent, traffic
from llmtrain.model.objective import cross_entropy
from llmtrain.model.router import Choice, Router
from llmtrain.ops import resolve
from llmtrain.parallel import mesh as world
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.stages.session import op_call
from llmtrain.train.loop import Inputs, Loop

STEPS = 2


class Counted(TorchDispatchMode):
    """Calls and bytes of every collective, by ranks of the process group and kind."""

    KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
    KINDS |= {"alltoall_base_": "all_to_all", "send": "send"}

    def __init__(self):
        super().__init__()
        self.found: dict[tuple, tuple[int, float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name.partition("::")[2], func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, func, args: tuple) -> None:
        if name == "recv_":
            return
        kind = self.KINDS[name]  # what is not known here must not go uncounted
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        group = dist.ProcessGroup.unbox(given["process_group"])
        if group.size() == 1:
            return
        value = next(given[key] for key in ("input_tensor", "input", "tensors") if key in given)
        tensors = value if isinstance(value, list | tuple) else [value]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        size = size / group.size() if kind == "reduce_scatter" else size  # its input is as large as all shards
        add(self.found, (members(group), kind), 1, sent(kind, size, group.size()))


def members(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The global ranks of a group; several groups, and several axes of a small mesh, may have the same."""
    return tuple(dist.get_process_group_ranks(group))


def add(found: dict, key: tuple, calls: float, size: float) -> None:
    before = found.get(key, (0, 0.0))
    found[key] = before[0] + calls, before[1] + size


def ranks_of(mesh: world.Mesh) -> dict[str, tuple[int, ...]]:
    """The ranks that this one talks to, by axis."""
    groups = {axis: mesh.group(axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    groups |= {"world": dist.group.WORLD, "fsdp": mesh.fsdp.get_group()}
    if mesh.experts is not None:
        groups |= {axis: mesh.expert_group(axis) for axis in mesh.shape.expert_axes}
    return {axis: members(group) for axis, group in groups.items()}


class Even:
    """Routes token i to experts i, i + 1, ...: every expert gets as many rows if their number divides that of the tokens."""

    def __init__(self, router: Router):
        self.route = router.forward

    def __call__(self, x):
        choice: Choice = self.route(x)
        even = torch.arange(len(choice.ids))[:, None] + torch.arange(choice.ids.shape[1])
        return choice._replace(ids=even % self.experts(x))

    def experts(self, x) -> int:
        return self.route.__self__.weight.shape[0]


def count(changes: dict) -> dict:
    """Of every rank: (calls, bytes) counted in STEPS steps and expected; and elements of each parameter by arithmetic and built."""
    torch.set_num_threads(1)
    cfg = RunConfig.model_validate(merge(merge(BASE, changes), {"train": {"steps": STEPS}}))
    device = select("cpu")
    mesh = world.start(cfg.parallel, device=device)
    engine = build(cfg, objective=cross_entropy, mesh=mesh, device=device, ops=resolve(cfg.kernels, op_call(cfg, device)))
    engine.calibrate = lambda batch: {}
    for part in engine.stages.parts.values():
        for module in part.modules():
            if isinstance(module, Router):
                module.forward = Even(module)
    counted, ranks = Counted(), ranks_of(mesh)
    plan = StepPlan.from_config(cfg)
    with counted:
        _loop(cfg, engine, mesh, device, plan).run(SimpleNamespace(should_stop=lambda: None))
    (segment,) = plan.segments
    expected: dict = {}
    for row in traffic(cfg, mesh.shape, segment, rank=mesh.rank):
        add(expected, (ranks[row.axis], row.kind), STEPS * row.calls, STEPS * row.bytes)
    held = Counter()
    for one in Shards(cfg, mesh.shape, rank=mesh.rank).held():
        held[one.name, one.copy] += one.elements
    built = {(name, False): local_tensor(p).numel() for name, p in engine.parameters.items()}
    for copy in engine.stages.copies.values():
        built["embedding.weight", True] = local_tensor(copy).numel()
    found = {"traffic": mesh.gather((counted.found, expected)), "held": mesh.gather((dict(held), built))}
    mesh.leave()
    return found


def _loop(cfg, engine, mesh, device, plan) -> Loop:
    def nothing(*args, **kwargs) -> None:
        pass

    checkpointer = SimpleNamespace(find=nothing, poll=list, save=nothing, wait=nothing, checkpoints=Path("/nonexistent"))
    return Loop(
        cfg,
        engine=engine,
        plan=plan,
        inputs=Inputs(dataset_of=lambda phase: Documents(), validation={}),
        mesh=mesh,
        device=device,
        folder=SimpleNamespace(path=Path("/nonexistent"), truncate_metrics=nothing),
        checkpointer=checkpointer,
        sinks=[],
        console=SimpleNamespace(message=nothing, progress=nothing),
    )


def count_all(scenarios: dict[str, dict]) -> dict[str, dict]:
    """Several meshes in one world, by name."""
    return {name: count(changes) for name, changes in scenarios.items()}
