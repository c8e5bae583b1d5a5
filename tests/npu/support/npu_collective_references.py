"""Formulas of torch_npu's operators that join products and collectives, of CPU tensors, over the group behind an `hccl` communicator.

They refuse what the real operators are documented to refuse or would compute wrongly in silence, and take fp32 too, so that numbers can
be judged.
"""

import torch
from hccl_over_gloo import GROUPS
from torch import Tensor


def _group(hcom: str, ranks: int):
    """The CPU group of a communicator. Raises ValueError for a name that no group has, and for another number of ranks than it has."""
    if hcom not in GROUPS:
        raise ValueError(f"no communicator is called {hcom!r}")
    group = GROUPS[hcom].twin
    if ranks != group.size():
        raise ValueError(f"world size {ranks}, but the communicator has {group.size()} ranks")
    return group


def _matrices(left: Tensor, right: Tensor) -> None:
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(f"{tuple(left.shape)} {left.dtype} times {tuple(right.shape)} {right.dtype}")
    if not left.is_contiguous():
        raise ValueError("the left matrix may not be transposed")
    if not left.numel() or not right.numel():
        raise ValueError("a matrix is empty")


def _plain(**options) -> None:
    """Refuse what no formula is here for."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise NotImplementedError(f"the stand-in has no {', '.join(given)}")


def npu_all_gather_base_mm(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    bias=None,
    x1_scale=None,
    x2_scale=None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype=None,
    comm_mode=None,
):
    group = _group(hcom, world_size)
    _plain(bias=bias, x1_scale=x1_scale, x2_scale=x2_scale, output_dtype=output_dtype, comm_mode=comm_mode)
    if gather_index or comm_turn:
        raise ValueError(f"gather_index {gather_index}, comm_turn {comm_turn}: 0 alone is supported")
    _matrices(input, x2)
    gathered = input.new_empty(world_size * input.shape[0], input.shape[1])
    group._allgather_base(gathered, input).wait()
    return gathered @ x2, gathered if gather_output else input.new_empty(0)


def npu_mm_reduce_scatter_base(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    reduce_op: str = "sum",
    bias=None,
    x1_scale=None,
    x2_scale=None,
    comm_turn: int = 0,
    output_dtype=None,
    comm_mode=None,
):
    group = _group(hcom, world_size)
    _plain(bias=bias, x1_scale=x1_scale, x2_scale=x2_scale, output_dtype=output_dtype, comm_mode=comm_mode)
    if reduce_op != "sum" or comm_turn:
        raise ValueError(f"reduce_op {reduce_op!r}, comm_turn {comm_turn}: 'sum' and 0 alone are supported")
    _matrices(input, x2)
    if input.shape[0] % world_size:
        raise ValueError(f"{input.shape[0]} rows over {world_size} ranks")
    partial = input @ x2
    everyone = partial.new_empty(world_size * partial.shape[0], partial.shape[1])
    group._allgather_base(everyone, partial.contiguous()).wait()
    return everyone.unflatten(0, (world_size, world_size, -1))[:, group.rank()].sum(0)


def npu_alltoallv_gmm(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: list[int],
    recv_counts: list[int],
    *,
    send_counts_tensor=None,
    recv_counts_tensor=None,
    mm_x=None,
    mm_weight=None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    comm_mode=None,
):
    group = _group(hcom, ep_world_size)
    _plain(
        send_counts_tensor=send_counts_tensor, recv_counts_tensor=recv_counts_tensor, mm_x=mm_x, mm_weight=mm_weight, comm_mode=comm_mode
    )
    weight = _experts(gmm_x, gmm_weight, trans_gmm_weight, ep_world_size, send_counts, recv_counts, sum(send_counts))
    arrived = _all_to_all(group, gmm_x, send_counts, recv_counts)
    by_source = [blocks.split(counts) for blocks, counts in _by_rank(arrived, recv_counts, ep_world_size)]
    by_expert = [torch.cat(blocks) for blocks in zip(*by_source)]
    product = torch.cat([rows @ matrix for rows, matrix in zip(by_expert, weight)])
    return product, gmm_x.new_empty(0), torch.cat(by_expert) if permute_out_flag else gmm_x.new_empty(0)


def npu_gmm_alltoallv(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: list[int],
    recv_counts: list[int],
    *,
    send_counts_tensor=None,
    recv_counts_tensor=None,
    mm_x=None,
    mm_weight=None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    comm_mode=None,
):
    group = _group(hcom, ep_world_size)
    _plain(
        send_counts_tensor=send_counts_tensor, recv_counts_tensor=recv_counts_tensor, mm_x=mm_x, mm_weight=mm_weight, comm_mode=comm_mode
    )
    weight = _experts(gmm_x, gmm_weight, trans_gmm_weight, ep_world_size, send_counts, recv_counts, sum(send_counts))
    of_expert = [send_counts[expert :: len(weight)] for expert in range(len(weight))]  # per destination
    blocks = [rows.split(sizes) for rows, sizes in zip(gmm_x.split([sum(sizes) for sizes in of_expert]), of_expert)]
    products = [[rows @ matrix for rows in parts] for parts, matrix in zip(blocks, weight)]
    leaving = torch.cat([products[expert][rank] for rank in range(ep_world_size) for expert in range(len(weight))])
    return _all_to_all(group, leaving, send_counts, recv_counts), gmm_x.new_empty(0)


def _experts(rows, weight, transposed, ranks, sent, received, expected) -> Tensor:
    """The experts' matrices [e,in,out], if the arguments fit each other."""
    weight = weight.transpose(1, 2) if transposed else weight
    if not len(sent) == len(received) == ranks * len(weight):
        raise ValueError(f"{len(sent)} and {len(received)} counts for {ranks} ranks x {len(weight)} experts")
    if rows.shape != (expected, weight.shape[1]) or rows.dtype != weight.dtype:
        raise ValueError(f"rows {tuple(rows.shape)} {rows.dtype} for {expected} counted and matrices {tuple(weight.shape)} {weight.dtype}")
    return weight


def _by_rank(rows: Tensor, counts: list[int], ranks: int):
    held = len(counts) // ranks
    parts = [counts[rank * held : (rank + 1) * held] for rank in range(ranks)]
    return list(zip(rows.split([sum(part) for part in parts]), parts))


def _all_to_all(group, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Rows by rank and expert, exchanged; ranks that count differently are refused instead of left waiting."""
    ranks = group.size()
    told = torch.empty(ranks, ranks * len(sent) // ranks, dtype=torch.int64)
    group._allgather_base(told, torch.tensor(sent)[None]).wait()
    mine = told.unflatten(1, (ranks, -1))[:, group.rank()].flatten().tolist()
    if mine != list(received):
        raise ValueError(f"the others send {mine}, but {list(received)} are to be received")
    splits = [[sum(part) for _, part in _by_rank(torch.empty(sum(counts), 0), counts, ranks)] for counts in (received, sent)]
    out = rows.new_empty(sum(received), rows.shape[1])
    group.alltoall_base(out, rows.contiguous(), *splits).wait()
    return out


REFERENCES = {
    function.__name__: function for function in (npu_all_gather_base_mm, npu_mm_reduce_scatter_base, npu_alltoallv_gmm, npu_gmm_alltoallv)
}
