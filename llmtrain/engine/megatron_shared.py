"""What the layers of the engine megatron ask of it while a micro-batch goes through them. Needs no megatron-core."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.engine.micro_batch import MicroBatch
from llmtrain.model.rope import Rope
from llmtrain.ops import Mask, Ops
from llmtrain.parallel.cp import ContextParallel


@dataclass
class Shared:
    """One for all layers of a rank. A layer is told the number of its micro-batch in the place of an attention mask, so that what is
    computed again in the backward pass finds it too."""

    cfg: ModelConfig
    ops: Ops
    dtype: torch.dtype
    cp: ContextParallel | None
    rope: Rope | None
    micros: list[MicroBatch] = field(default_factory=list)
    current: int = 0

    def number(self, index: int) -> Tensor:
        """What is given to the model as attention mask."""
        return torch.tensor([index])

    def at(self, number: Tensor) -> None:
        """Layers now compute the micro-batch of this number."""
        self.current = int(number)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """RoPE's (cos, sin), each [B,1,S,d], or None without it; MicroBatch asks for it once."""
        return None if self.rope is None else self.rope(positions, dtype)

    def cos_sin(self) -> tuple[Tensor, Tensor] | None:
        """The rotation of the current micro-batch."""
        return self.micros[self.current].rope(self, self.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B,H,S,d], k [B,K,S,d], v [B,K,S,dv] of the current micro-batch, rotated -> [B,H,S,dv]."""
        mask: Mask = self.micros[self.current].mask
        window = self.cfg.attention.window
        mask = mask if window is None else mask.windowed(window)
        attend = self.ops.attention if self.cp is None else self.cp.attend
        return attend(q, k, v, mask=mask)
