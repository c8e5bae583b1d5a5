"""torch's flex_attention as an entry. Not run on hardware, and taken only when named: it is compiled once per kind of mask and shape, and
its block mask is made from S x T booleans."""

import importlib.util
from functools import cache
from typing import Any

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.registry import Call, register


def _probe() -> str | None:
    return None if importlib.util.find_spec("triton") else "needs triton: pip install llmtrain[cuda]"


def _supports(call: Call) -> str | None:
    if call.capability is not None and call.capability < (8, 0):
        return f"is compiled by triton, which has no tensor cores at compute capability {call.capability[0]}.{call.capability[1]}"
    return None


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@register("attention", "flex", devices=("cuda",), dtypes=DTYPES, speed=-0.3, probe=_probe, supports=_supports, deterministic=False)
def attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shapes as in `attention_reference`; causality, documents, windows and offsets become one `mask_mod`. lse has a gradient."""
    from torch.nn.attention.flex_attention import AuxRequest

    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    place = (q.shape[2], k.shape[2], q_offset, kv_offset, q.device)
    blocks = mask.once(("flex blocks", *place), lambda mask: _blocks(mask, *place))
    wanted = AuxRequest(lse=True) if return_lse else None
    options = {"block_mask": blocks, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1], "return_aux": wanted}
    given = _compiled()(q, k, v, **options)
    return (given[0], given[1].lse) if return_lse else given


@cache
def _compiled() -> Any:
    """Compiled, since the plain function holds all S x T scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _blocks(mask: Mask, queries: int, keys: int, q_offset: int, kv_offset: int, device: torch.device) -> Any:
    """The mask as flex_attention takes it; None if nothing is hidden."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not mask.causal and mask.documents is None:
        return None
    document = None if mask.documents is None else torch.tensor([_numbers(row) for row in mask.documents], device=device)

    def seen(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = query + q_offset, key + kv_offset
        visible = key <= query if mask.causal else key >= 0
        if mask.window is not None:
            visible = visible & (query - key < mask.window)
        return visible if document is None else visible & (document[row, query] == document[row, key])

    rows = None if mask.documents is None else len(mask.documents)
    return create_block_mask(seen, rows, None, queries, keys, device=device)


def _numbers(lengths: tuple[int, ...]) -> list[int]:
    """Of every position, which document it lies in."""
    return [number for number, length in enumerate(lengths) for _ in range(length)]
