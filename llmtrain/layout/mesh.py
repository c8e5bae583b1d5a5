"""The mesh as arithmetic: how many ranks along each axis, which rank stands where, and which ranks form each group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from llmtrain.config.train import ParallelConfig
from llmtrain.errors import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep", "etp")
NODE_AXES = ("pp", "dp_replicate", "efsdp", "ep_outer", "ep_inner", "etp")
"""EXPERT_AXES with ep cut in two for hierarchical dispatch: ranks of a node are neighbours, `ep_outer` goes from node to node."""
FLAT = {"fsdp": ("dp_shard", "cp")}
"""Axes that are also used as one: parameters are sharded over dp_shard x cp, since ranks of cp hold the same parameters."""


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other, in order."""

    axis: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class MeshShape:
    """Ranks along each axis; the last axis varies fastest over global ranks. `ep` is laid over the others and adds no ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    ep_inner: int | None = None
    """Ranks of ep that are of one node, where dispatch is hierarchical."""

    @classmethod
    def from_config(cls, cfg: ParallelConfig, *, world: int | None = None, local: int | None = None) -> "MeshShape":
        """The shape of `cfg`; dp_shard -1 takes what `world` leaves. `local` is the number of ranks of a node, all of them if not given.

        Raises UserError, with the arithmetic, if it does not fit.
        """
        shape = cls(**{axis: getattr(cfg, axis) for axis in (*AXES, "ep", "etp")})
        if cfg.dp_shard == -1:
            others = replace(shape, dp_shard=1).world
            if (world or others) % others:
                raise UserError(f"{world} ranks are not a multiple of the other axes' product {others}; change parallel.*")
            shape = replace(shape, dp_shard=(world or others) // others)
        if world is not None and shape.world != world:
            product = " x ".join(f"{axis} {getattr(shape, axis)}" for axis in AXES)
            raise UserError(f"parallel asks for {product} = {shape.world} ranks, {world} were started; change parallel.* or the launch")
        shape._check_experts()
        return replace(shape, ep_inner=shape._inner(cfg, local or shape.world))

    def _check_experts(self) -> None:
        if self.etp not in (1, self.tp):
            raise UserError(f"parallel.etp {self.etp}: allowed are 1 and the value of parallel.tp, {self.tp}")
        if self._sharing % self.ep:
            over = f"dp_shard {self.dp_shard} x cp {self.cp}" + (f" x tp {self.tp}" if self.etp < self.tp else "")
            raise UserError(f"parallel.ep {self.ep} does not divide {over} = {self._sharing}; change parallel.ep or those axes")

    def _inner(self, cfg: ParallelConfig, local: int) -> int | None:
        if cfg.ep_kind != "hierarchical":
            if cfg.ep_inner is not None:
                raise UserError(f"parallel.ep_inner {cfg.ep_inner} is for parallel.ep_kind hierarchical, not {cfg.ep_kind}; take one back")
            return None
        if self.ep == 1:
            return None
        if cfg.ep_inner is not None:
            inner, what = cfg.ep_inner, f"parallel.ep_inner {cfg.ep_inner}"
        elif self.tp > 1 and self.etp == 1:
            inner, what = self.tp, f"parallel.ep_inner, by default parallel.tp {self.tp},"
        else:
            inner, what = local / self.etp, f"parallel.ep_inner, by default the {local} ranks of a node"
            what += f" / parallel.etp {self.etp} = {inner:g}," if self.etp > 1 else ","
        if inner >= self.ep:
            raise UserError(
                f"{what} leaves nothing between nodes: parallel.ep is {self.ep}; set a smaller ep_inner, or parallel.ep_kind all_to_all"
            )
        if self.ep % inner or inner % 1:
            raise UserError(
                f"{what} does not divide parallel.ep {self.ep}: {self.ep} / {inner:g} = {self.ep / inner:.2f}; set parallel.ep_inner"
            )
        return int(inner)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Axes of which groups are made for experts alone, in this order."""
        return ("efsdp", "ep", "etp") if self.ep_inner is None else ("efsdp", "ep", "etp", "ep_outer", "ep_inner")

    @property
    def ep_outer(self) -> int:
        """Nodes that share the experts, where dispatch is hierarchical."""
        return self.ep // self.ep_inner

    @property
    def _sharing(self) -> int:
        """Ranks that hold each expert once between them."""
        return self.dp_shard * self.cp * self.tp // self.etp

    @property
    def efsdp(self) -> int:
        """Ranks that share the parameters of the same experts."""
        return self._sharing // self.ep

    @property
    def fsdp(self) -> int:
        """Ranks that share one copy of the parameters of dense layers."""
        return self.dp_shard * self.cp

    @property
    def shares_parameters(self) -> bool:
        """Whether any gradient is to be summed over ranks that hold the same parameters: those of dense layers, or those of experts."""
        experts = self.ep > 1 or self.etp > 1
        return self.fsdp * self.dp_replicate > 1 or (experts and self.efsdp > 1)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return prod(self.sizes(AXES))

    @property
    def dp(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    def sizes(self, axes: Sequence[str]) -> tuple[int, ...]:
        """Ranks along each of `axes`."""
        return tuple(getattr(self, axis) for axis in axes)

    def place(self, rank: int, axes: Sequence[str] = AXES) -> dict[str, int]:
        """Where `rank` stands along each of AXES, EXPERT_AXES or NODE_AXES."""
        coordinates = {}
        for axis, size in zip(reversed(axes), reversed(self.sizes(axes))):
            rank, coordinates[axis] = divmod(rank, size)
        return coordinates

    def rank(self, place: dict[str, int], axes: Sequence[str] = AXES) -> int:
        """The rank that stands at `place`; the inverse of `place`."""
        rank = 0
        for axis, size in zip(axes, self.sizes(axes)):
            rank = rank * size + place[axis]
        return rank

    def describe(self) -> str:
        """`dp_shard 2 x tp 4`, or `one rank`."""
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in (*AXES, "ep") if getattr(self, axis) > 1) or "one rank"

    def groups(self, axis: str) -> list[Group]:
        """All groups of one axis of AXES, EXPERT_AXES, NODE_AXES or FLAT: they part the world, and each is in the order of its ranks."""
        firsts = (rank for rank in range(self.world) if not any(self.place(rank, _root(axis))[a] for a in FLAT.get(axis, (axis,))))
        return [self.group(axis, rank) for rank in firsts]

    def group(self, axis: str, rank: int) -> Group:
        """The group of `axis` that `rank` is in."""
        axes, inner = _root(axis), FLAT.get(axis, (axis,))
        place = self.place(rank, axes)
        members = (place | dict(zip(inner, at)) for at in product(*(range(getattr(self, a)) for a in inner)))
        return Group(axis, tuple(self.rank(member, axes) for member in members))

    def all_groups(self, *, experts: bool) -> list[Group]:
        """Every group in the order in which all ranks make them: axis by axis, those of the experts last and only if there are any.

        The experts' mesh has groups of pp and dp_replicate of its own. A group of all ranks is the world's, which is there already.
        """
        shared = [axis for axis in EXPERT_AXES if axis in AXES]
        order = [*AXES, *FLAT, *((*shared, *self.expert_axes) if experts else ())]
        return [group for axis in order for group in self.groups(axis)]


def _root(axis: str) -> tuple[str, ...]:
    """The axes of the mesh that `axis` belongs to."""
    return AXES if axis in AXES or axis in FLAT else EXPERT_AXES if axis in EXPERT_AXES else NODE_AXES
