"""One call of the kernels: tiles, grids, strides."""

from typing import Any

import torch
from llmtrain_kernels.triton_attention import tiles
from llmtrain_kernels.triton_attention.available import chip
from llmtrain_kernels.triton_attention.backward import attention_backward_kv, attention_backward_q, attention_delta
from llmtrain_kernels.triton_attention.blocks import LOG2E
from llmtrain_kernels.triton_attention.forward import attention_forward
from llmtrain_kernels.triton_attention.intervals import Layout, intervals
from llmtrain_kernels.triton_attention.tiles import BACKWARD_KV, BACKWARD_Q, DELTA, FORWARD, padded
from torch import Tensor

MOST_BLOCKS = {"npu": 65520}
"""Blocks of a launch; CANN counts them in 16 bits. A multiple of 16, since Triton compiles again for others."""


class Launch:
    """q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv] with a last stride of 1; what it writes to is allocated by the caller."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, scale: float):
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.batch, self.heads, self.queries, self.d = q.shape
        self.kv_heads, self.keys, self.dv = v.shape[1:]
        self.chip = chip(q.device.type, q.device.index)
        self.intervals = intervals(layout, self.queries, self.keys, q.device)
        self.strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
        self.sizes = {"GROUP": self.heads // self.kv_heads, "D": self.d, "DV": self.dv, "D_PAD": padded(self.d), "DV_PAD": padded(self.dv)}

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Fill out [B,H,S,dv] and lse [B,H,S]."""
        first, last, _, _ = self.intervals
        tile = self._tile(FORWARD)
        places = (first, last, self.scale * LOG2E.value, _row(first), *self.strides, *out.stride()[:3], self.heads, self.queries, self.keys)
        self._run(attention_forward, self._blocks(self.queries, tile.queries) * self.heads, (*self._inputs, out, lse, *places), tile)

    def backward(self, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Fill the gradients of q, k and v."""
        delta = self._delta(grad, grad_lse, out, lse)
        first, last, q_first, q_last = self.intervals
        strides = (*self.strides, *grad.stride()[:3])
        inputs = (*self._inputs, grad, lse, delta)

        tile = self._tile(BACKWARD_Q)
        places = (*strides, *grads[0].stride()[:3], self.heads, self.queries, self.keys)
        args = (*inputs, grads[0], first, last, self.scale, _row(first), *places)
        self._run(attention_backward_q, self._blocks(self.queries, tile.queries) * self.heads, args, tile)

        tile = self._tile(BACKWARD_KV)
        places = (*strides, *grads[1].stride()[:3], *grads[2].stride()[:3], self.kv_heads, self.queries, self.keys)
        args = (*inputs, *grads[1:], q_first, q_last, self.scale, _row(q_first), *places)
        self._run(attention_backward_kv, self._blocks(self.keys, tile.keys) * self.kv_heads, args, tile)

    def _delta(self, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
        delta = torch.empty_like(lse)
        rows = self._tile(DELTA).queries
        strides = (*out.stride()[:3], *grad.stride()[:3])
        args = (out, grad, lse, lse if grad_lse is None else grad_lse, delta, *strides, self.heads, self.queries)
        sizes = {"HAS_GRAD_LSE": grad_lse is not None, "DV": self.dv, "DV_PAD": padded(self.dv), "ROWS": rows}
        self._grid(attention_delta, self._blocks(self.queries, rows) * self.heads, args, sizes)
        return delta

    @property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def _tile(self, kernel: str) -> tiles.Tile:
        return tiles.tile(self.chip, kernel, d=self.d, dv=self.dv, itemsize=self.q.element_size())

    def _blocks(self, places: int, size: int) -> int:
        """Blocks of `size` places of one head in all batch rows."""
        return self.batch * -(-places // size)

    def _run(self, kernel: Any, blocks: int, args: tuple, tile: tiles.Tile) -> None:
        precision = "widened" if self.chip == "interpreter" else "ieee"
        columns = {"ROWS": tile.queries, "COLUMNS": tile.keys, "PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages}
        if self.q.device.type == "cuda":
            columns["enable_fp_fusion"] = True  # scaling and subtracting the maximum in one instruction; from 3.10 on not the default
        self._grid(kernel, blocks, args, self.sizes | columns)

    def _grid(self, kernel: Any, blocks: int, args: tuple, sizes: dict[str, Any]) -> None:
        most = MOST_BLOCKS.get(self.q.device.type, 2**31 - 16)
        for first in range(0, blocks, most):
            kernel[(min(most, blocks - first),)](*args, first, **sizes)


def _row(intervals: Tensor) -> int:
    """Elements from one batch row of the intervals to the next: 0 where all rows share one."""
    return intervals.stride(0) if intervals.shape[0] > 1 else 0
