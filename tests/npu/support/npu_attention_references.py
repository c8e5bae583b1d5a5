"""Plain formulas in the place of the attention kernels of `npu::` ops; see npu_references.py."""

import torch
from torch import Tensor

REFERENCES = {}
HIDDEN = -1e30


def reference(function):
    REFERENCES[function.__name__] = function
    return function


def hidden(queries: int, keys: int, *, atten_mask, sparse_mode: int, pre_tockens: int, next_tockens: int) -> Tensor:
    """[queries,keys], True where a key is hidden, by the table of sparse modes."""
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    if atten_mask is None:
        return torch.zeros(queries, keys, dtype=torch.bool)  # whatever the mode says: the operator is silent about it
    if sparse_mode == 0:
        return atten_mask.bool() | (column > row + next_tockens) | (column < row - pre_tockens)
    assert sparse_mode in (2, 3, 4) and tuple(atten_mask.shape) == (2048, 2048)
    # The compressed mask is looked at in tiles, so its content counts: one of the wrong polarity hides the other side.
    diagonal = {2: 0, 3: keys - queries, 4: keys - queries}[sparse_mode]
    if sparse_mode == 4:
        result = (column > row + diagonal + next_tockens) | (column < row + diagonal - pre_tockens)
    else:
        result = column > row + diagonal
    return result if bool(atten_mask[0, 1]) and not bool(atten_mask[1, 0]) else ~result


def probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [N,S,D], k [N,T,D] -> softmax, row maximum and sum, [N,S,1] each."""
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(mask, HIDDEN)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    return weights / weights.sum(-1, keepdim=True), top, weights.sum(-1, keepdim=True)


def sequences(layout: str, tensors: list[Tensor], ends: list[list[int] | None]) -> list[list[Tensor]]:
    """Per sequence the tensors as [heads,S,D] in fp32; `ends` are running sums, one list per tensor."""
    if layout == "BNSD":
        return [[t[b].float() for t in tensors] for b in range(len(tensors[0]))]
    assert layout == "TND"
    for t, stops in zip(tensors, ends):
        assert stops[0] > 0 and stops[-1] == len(t) and sorted(stops) == stops, f"running sums without a leading 0 end at {len(t)}: {stops}"
    return [
        [t[stops[i - 1] if i else 0 : stops[i]].transpose(0, 1).float() for t, stops in zip(tensors, ends)] for i in range(len(ends[0]))
    ]


def joined(layout: str, parts: list[Tensor]) -> Tensor:
    """What `sequences` took apart."""
    return torch.stack(parts) if layout == "BNSD" else torch.cat([part.transpose(0, 1) for part in parts])


@reference
def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
    softmax_layout="",
    sink=None,
    dropout_mask=None,
    seed=0,
    offset=0,
):
    assert pse is None and keep_prob == 1 and sink is None and prefix is None
    assert head_num == query.shape[1], f"head_num {head_num} with {query.shape[1]} query heads"
    mode = {"atten_mask": atten_mask, "sparse_mode": sparse_mode, "pre_tockens": pre_tockens, "next_tockens": next_tockens}
    outs, tops, sums = [], [], []
    for q, k, v in sequences(input_layout, [query, key, value], [actual_seq_qlen, actual_seq_kvlen, actual_seq_kvlen]):
        repeat = len(q) // len(k)
        weights, top, total = probabilities(q, k.repeat_interleave(repeat, 0), scale, hidden(q.shape[1], k.shape[1], **mode))
        outs.append(weights @ v.repeat_interleave(repeat, 0))
        tops.append(top.expand(-1, -1, 8))
        sums.append(total.expand(-1, -1, 8))
    out = joined(input_layout, outs).to(query.dtype)
    order = "TND" if softmax_layout == "TND" else "NTD"
    stats = [joined(input_layout, x) if input_layout == "BNSD" or order == "TND" else torch.cat(x, 1) for x in (tops, sums)]
    if input_layout == "TND" and order == "NTD":  # the shape is [T,N,8] either way, the memory is in another order
        stats = [x.contiguous().view(len(query), head_num, 8) for x in stats]
    return out, *(x.contiguous() for x in stats), query.new_empty(0), 0, 0, 0


@reference
def npu_fusion_attention_grad(
    query,
    key,
    value,
    dy,
    head_num,
    input_layout,
    *,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    softmax_max=None,
    softmax_sum=None,
    softmax_in=None,
    attention_in=None,
    scale_value=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    seed=0,
    offset=0,
    numels=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
    softmax_layout="",
    sink=None,
):
    """From the statistics that are handed in, like the kernel, and not from the scores' own."""
    assert head_num == query.shape[1] and softmax_max.shape[-1] == softmax_sum.shape[-1] == 8 and softmax_max.dtype == torch.float32
    mode = {"atten_mask": atten_mask, "sparse_mode": sparse_mode, "pre_tockens": pre_tockens, "next_tockens": next_tockens}
    if input_layout == "TND" and softmax_layout != "TND":
        softmax_max, softmax_sum = (x.reshape(head_num, len(query), 8).transpose(0, 1) for x in (softmax_max, softmax_sum))
    q_ends, k_ends = actual_seq_qlen, actual_seq_kvlen
    tensors = [query, key, value, dy, attention_in, softmax_max, softmax_sum]
    grads = [[], [], []]
    for q, k, v, above, out, top, total in sequences(input_layout, tensors, [q_ends, k_ends, k_ends, q_ends, q_ends, q_ends, q_ends]):
        heads, repeat = len(k), len(q) // len(k)
        wide_k, wide_v = (x.repeat_interleave(repeat, 0) for x in (k, v))
        scores = (q @ wide_k.transpose(1, 2) * scale_value).masked_fill(hidden(q.shape[1], k.shape[1], **mode), HIDDEN)
        weights = torch.exp(scores - top[..., :1]) / total[..., :1]
        slope = weights * (above @ wide_v.transpose(1, 2) - (above * out).sum(-1, keepdim=True)) * scale_value
        grads[0].append(slope @ wide_k)
        grads[1].append((slope.transpose(1, 2) @ q).unflatten(0, (heads, repeat)).sum(1))
        grads[2].append((weights.transpose(1, 2) @ above).unflatten(0, (heads, repeat)).sum(1))
    done = [joined(input_layout, parts).to(query.dtype).contiguous() for parts in grads]
    return *done, query.new_empty(0), query.new_empty(0)
