"""The meshes, and what both sides are given on them: batches and first weights. B rows, S positions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from train_peers import shape as s

NO_TARGET = -100


@dataclass(frozen=True)
class Case:
    """A mesh: its options of llmtrain, and the module of `by_hand` for it."""

    name: str
    script: str
    axes: dict[str, int]
    micro_batches: int = 1

    @property
    def ranks(self) -> int:
        """Processes."""
        ranks = 1
        for size in self.axes.values():
            ranks *= size
        return ranks

    def options(self, shape: s.Shape) -> dict:
        """`parallel` of a configuration."""
        stages = {"layers_per_stage": [shape.layers // 2, shape.layers - shape.layers // 2]} if "pp" in self.axes else {}
        return {**self.axes, **stages, "affinity": "off", "threads": 1}


CASES = {
    case.name: case
    for case in (
        Case("one", "", {}),
        Case("dp2", "dp", {"dp_shard": 2}),
        Case("tp2", "tp", {"tp": 2}),
        Case("pp2", "pp", {"pp": 2}, micro_batches=4),
        Case("cp2", "cp", {"cp": 2}),
        Case("tp2.dp2", "tp_dp", {"dp_shard": 2, "tp": 2}),
    )
}


def batches(shape: s.Shape) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) [B,S]; the later a row, the fewer targets it has, so that ranks differ in how many they hold."""
    made = s.batches(shape)
    for _, targets in made:
        for row in range(shape.batch):
            targets[row, : row * shape.seq // (2 * shape.batch)] = NO_TARGET
    return made


def first_weights(shape: s.Shape) -> dict[str, Tensor]:
    """The whole model as the engine fills it on any mesh, by name."""
    from llmtrain.model import family
    from llmtrain.model.init import initialise
    from llmtrain.ops import Call, resolve
    from mesh_worlds.ours import config

    cfg = config(CASES["dp2"], shape)
    call = Call(device="cpu", dtype=torch.float32, head_dim=shape.dim // shape.heads, heads=shape.heads, kv_heads=shape.heads)
    model = family.build(cfg.model, resolve(cfg.kernels, call), None)
    initialise(model, cfg.model, cfg.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
