"""Attention, output projection and all-reduce in tiles, by ranks that share heads, against one process that has all of them."""

import torch
import torch.distributed as dist
from llmtrain_kernels import Mask
from llmtrain_kernels.tiled_reduce import attention_project_reduce

from llmtrain.ops.attention import attention_reference
from llmtrain.ops.sdpa import attention_sdpa
from llmtrain.ops.tiled_attention import attention_tiled

ATTENTION = {"reference": attention_reference, "sdpa": attention_sdpa, "tiled": attention_tiled}
HEADS, KV_HEADS, WIDTH, VALUE, MODEL = 4, 2, 8, 6, 20


def compare(cases: dict[str, dict], names: list[str], counts: list[int]) -> dict[str, float]:
    """Largest difference, as share of the largest number, of each case by each attention in each number of tiles."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for case, options in cases.items():
        q, k, v, weight = tensors(**options)
        rest = {"mask": Mask(**options.get("mask", {})), "q_offset": options.get("q_offset", 0), "kv_offset": options.get("kv_offset", 0)}
        expected = attention_reference(q, k, v, **rest).transpose(1, 2).flatten(2) @ weight.t()
        for name in names:
            for count in counts:
                parts = [mine(x) for x in (q, k, v)]
                columns = mine(weight.view(MODEL, HEADS, VALUE)).flatten(1)
                out = attention_project_reduce(*parts, columns, attention=ATTENTION[name], reduce=start, count=count, **rest)
                found[f"{case}, {name}, {count} tiles"] = ((out - expected).abs().max() / expected.abs().max()).item()
    return found


def tensors(*, batch: int, queries: int, keys: int, **_) -> list[torch.Tensor]:
    """q, k, v and the weight of the projection, of all heads."""
    draw = torch.Generator().manual_seed(batch * 1000 + queries * 10 + keys)
    shapes = (batch, HEADS, queries, WIDTH), (batch, KV_HEADS, keys, WIDTH), (batch, KV_HEADS, keys, VALUE), (MODEL, HEADS * VALUE)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


def mine(whole: torch.Tensor) -> torch.Tensor:
    """This rank's heads, which lie along dim 1."""
    return whole.chunk(dist.get_world_size(), 1)[dist.get_rank()]


def start(part: torch.Tensor) -> dist.Work:
    """A sum over the ranks."""
    return dist.all_reduce(part, async_op=True)
