"""The mesh as arithmetic: how many ranks along each axis, and which rank stands where."""

from dataclasses import dataclass, replace

from llmtrain.config.train import ParallelConfig
from llmtrain.errors import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class MeshShape:
    """Ranks along each axis; the last axis varies fastest over global ranks. `ep` is laid over dp_shard x cp and adds no ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @classmethod
    def from_config(cls, cfg: ParallelConfig, *, world: int | None = None) -> "MeshShape":
        """The shape of `cfg`; dp_shard -1 takes what `world` leaves. Raises UserError, with the arithmetic, if it does not fit."""
        shape = cls(**{axis: getattr(cfg, axis) for axis in (*AXES, "ep")})
        if cfg.dp_shard == -1:
            others = replace(shape, dp_shard=1).world
            if (world or others) % others:
                raise UserError(f"{world} ranks are not a multiple of the other axes' product {others}; change parallel.*")
            shape = replace(shape, dp_shard=(world or others) // others)
        if world is not None and shape.world != world:
            product = " x ".join(f"{axis} {getattr(shape, axis)}" for axis in AXES)
            raise UserError(f"parallel asks for {product} = {shape.world} ranks, {world} were started; change parallel.* or the launch")
        if (shape.dp_shard * shape.cp) % shape.ep:
            raise UserError(f"parallel.ep {shape.ep} does not divide dp_shard {shape.dp_shard} x cp {shape.cp}")
        return shape

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    def describe(self) -> str:
        """`dp_shard 2 x tp 4`, or `one rank`."""
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in (*AXES, "ep") if getattr(self, axis) > 1) or "one rank"
