"""The mesh of a run without its ranks: all groups by arithmetic, and every role of a rank built by the code of real runs on meta."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from multiprocessing import get_context

import torch
import torch.distributed as dist

from llmtrain.compat import fake_world
from llmtrain.config.fields import root
from llmtrain.config.parameters import BYTES
from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.engine.stages import build_stages
from llmtrain.hardware.cores import allowed_cpus
from llmtrain.layout.mesh import AXES, Group, MeshShape
from llmtrain.layout.shards import Shards
from llmtrain.ops import resolve
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.mesh import Mesh
from llmtrain.plugins import load_plugins
from llmtrain.stages.session import op_call
from llmtrain.tools.progress import Progress

SEVERAL = 16
"""Roles from which several processes share the work: one starts in a few seconds, a role of thousands of ranks takes half of one."""


@dataclass(frozen=True)
class Role:
    """What a rank holds, as built: equal for ranks that do the same."""

    pp: int
    stages: tuple[tuple[int, int], ...]
    """(stage, blocks in it)"""
    ends: tuple[str, ...]
    """What the rank holds besides blocks."""
    parameters: int
    """Elements of this rank's shards, a copied embedding included."""
    partial: int
    """Those whose gradients are summed over tp."""
    state_bytes: int
    """Parameters, gradients and both moments."""


def check_groups(shape: MeshShape, *, experts: bool) -> dict[str, list[Group]]:
    """All groups by axis, in the order in which all ranks make them.

    Every axis parts the world, so every rank is in one group of each and meets all others of it in the same order. Raises RuntimeError if
    an axis does not.
    """
    axes: dict[str, list[Group]] = {}
    for axis, run in groupby(shape.all_groups(experts=experts), key=lambda group: group.axis):
        axes[axis] = list(run)
        if sorted(rank for group in axes[axis] for rank in group.ranks) != list(range(shape.world)):
            raise RuntimeError(f"the groups of axis {axis} do not part the {shape.world} ranks of {shape.describe()}")
    return axes


def role_ranks(shape: MeshShape) -> list[int]:
    """The ranks that are built: every place along pp and tp, at the first and at the last place along the other axes."""
    first = dict.fromkeys(("dp_replicate", "dp_shard", "cp"), 0)
    last = {axis: getattr(shape, axis) - 1 for axis in first}
    places = product(range(shape.pp), range(shape.tp), (first, last))
    return sorted({shape.rank({"pp": pp, "tp": tp, **others}) for pp, tp, others in places})


def build_role(cfg: RunConfig, shape: MeshShape, rank: int) -> Role:
    """Build what global rank `rank` of `shape` holds, as a run does, without memory for it.

    Raises RuntimeError where groups or sizes are not those of the arithmetic (`layout/`).
    """
    device = select("cpu")
    device.torch_device = torch.device("meta")
    quiet = cfg.model_copy(update={"train": cfg.train.model_copy(update={"compile": "off"})})  # changes no parameter
    with fake_world(rank, shape.world):
        mesh = Mesh(shape, device=device)
        _check_own_groups(mesh)
        stages = build_stages(quiet, mesh=mesh, device=device, ops=resolve({}, op_call(cfg, device)))
        held = {name: local_tensor(p).numel() for name, p in (stages.parameters | stages.copies).items()}
        if in_closed_form(cfg):
            _check_sizes(cfg, shape, rank, held)
        elements = sum(held.values())
        trained = sum(held[name] for name, p in (stages.parameters | stages.copies).items() if p.requires_grad)
        return Role(
            pp=mesh.place("pp"),
            stages=tuple((stage, len(part.blocks)) for stage, part in stages.parts.items()),
            ends=tuple(sorted({name.split(".")[0] for name in held} - {"blocks"})),
            parameters=elements,
            partial=sum(held[name] for name in stages.partial),
            state_bytes=trained * bytes_per_element(cfg) + (elements - trained) * BYTES[cfg.precision.params],
        )


def in_closed_form(cfg: RunConfig) -> bool:
    """Whether `layout/` knows the parts that ranks hold and send: of the built-in transformer, all of which is trained."""
    return cfg.model.family == "transformer" and not cfg.lora.rank


def bytes_per_element(cfg: RunConfig) -> int:
    """Of a trained parameter, its gradient and its two moments."""
    precision = cfg.precision
    return BYTES[precision.params] + BYTES[precision.params] + 2 * BYTES[precision.optimizer]


def _check_own_groups(mesh: Mesh) -> None:
    groups = {axis: mesh.group(axis) for axis in AXES} | {"fsdp": mesh.fsdp.get_group()}
    if mesh.experts is not None:
        groups |= {axis: mesh.expert_group(axis) for axis in mesh.shape.expert_axes}
    for axis, group in groups.items():
        mine = mesh.shape.group(axis, mesh.rank).ranks
        if tuple(dist.get_process_group_ranks(group)) != mine:
            raise RuntimeError(f"rank {mesh.rank}: the mesh made another group of axis {axis} than {mine}")


def _check_sizes(cfg: RunConfig, shape: MeshShape, rank: int, built: dict[str, int]) -> None:
    expected: Counter[str] = Counter()
    for one in Shards(cfg, shape, rank=rank).held():
        expected["copy" if one.copy else one.name] += one.elements
    wrong = {name for name in expected if name != "copy" and built.get(name) != expected[name]}
    if wrong or sum(built.values()) != sum(expected.values()):
        raise RuntimeError(f"rank {rank} holds other parts than the arithmetic says of {', '.join(sorted(wrong)) or 'the embedding copy'}")


def build_roles(cfg: RunConfig, shape: MeshShape) -> list[tuple[int, Role]]:
    """(rank, role) of every rank of `role_ranks`, in order. Several processes where there are many; says how far it is."""
    ranks = role_ranks(shape)
    with Progress("building roles", len(ranks), "ranks") as progress:
        found = []
        for done, role in enumerate(_built(cfg, shape, ranks), 1):
            found.append(role)
            if done % SEVERAL == 0:  # the first ones also wait for the processes to start, which says nothing of the others
                progress.at(done)
    return list(zip(ranks, found))


def _built(cfg: RunConfig, shape: MeshShape, ranks: list[int]) -> Iterator[Role]:
    workers = min(len(allowed_cpus()), len(ranks) // SEVERAL)
    if workers < 2:
        yield from (build_role(cfg, shape, rank) for rank in ranks)
        return
    values = cfg.model_dump(mode="json")  # classes that plugins have extended cannot be sent
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(cfg.plugins,)) as pool:
        try:
            yield from pool.map(partial(_build, values, shape), ranks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(plugins: list[str]) -> None:
    torch.set_num_threads(1)
    load_plugins(plugins)


def _build(values: dict, shape: MeshShape, rank: int) -> Role:
    return build_role(root().model_validate(values), shape, rank)
