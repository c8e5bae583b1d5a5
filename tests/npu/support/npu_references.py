"""Plain formulas in the place of the NPU kernels of `npu::` ops: forward ones and those that torch_npu's autograd nodes call.

They follow the documentation in the wheel. Judging is not done with these but with `formulas.py`, which shares no code with them.
Tensors are CPU tensors over the device's memory; computed in fp32, as the kernels do, returned in the dtypes of the op.
Only what this project uses is served: anything else fails, and so does what the documentation calls an error.
"""

import torch
from torch import Tensor

REFERENCES = {}
HIDDEN = -1e30


def reference(function):
    REFERENCES[function.__name__] = function
    return function


@reference
def npu_rms_norm(input, gamma, epsilon=1e-6):
    rstd = torch.rsqrt(input.float().square().mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@reference
def npu_rms_norm_backward(dy, input, gamma, rstd):
    normed, grad = input.float() * rstd, dy.float()
    above = grad * gamma.float()
    dx = rstd * (above - normed * (above * normed).mean(-1, keepdim=True))
    return dx.to(input.dtype), (grad * normed).flatten(0, -2).sum(0)


@reference
def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    total = x1 + x2
    y, rstd = npu_rms_norm(total, gamma, epsilon)
    return y, rstd, total


@reference
def npu_swiglu(input, dim=-1):
    gate, up = input.float().chunk(2, dim)
    return (gate * gate.sigmoid() * up).to(input.dtype)


@reference
def npu_swiglu_backward(grad_output, input, dim=-1):
    gate, up = input.float().chunk(2, dim)
    above, sigma = grad_output.float(), gate.sigmoid()
    slope = sigma + gate * sigma * (1 - sigma)
    return torch.cat((above * up * slope, above * gate * sigma), dim).to(input.dtype)


@reference
def npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    assert rotate is None and input.dtype == r1.dtype == r2.dtype
    if rotary_mode == "interleave":
        turned = torch.stack((-input[..., 1::2], input[..., ::2]), -1).flatten(-2)
    else:
        first, second = input.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return input * r1 + turned * r2


@reference
def npu_cross_entropy_loss(
    input, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0, lse_square_scale_for_zloss=0.0, return_zloss=False
):
    """A negative ignore_index means that nothing is ignored, so every target has to be a label."""
    assert weight is None and label_smoothing == 0 and lse_square_scale_for_zloss == 0 and not return_zloss
    assert ignore_index < 0 and bool(((target >= 0) & (target < input.shape[1])).all()), "target outside of the labels"
    log_prob = torch.log_softmax(input.float(), -1)
    loss = -log_prob.gather(1, target[:, None])[:, 0]
    loss = {"none": loss, "sum": loss.sum()[None], "mean": loss.mean()[None]}[reduction]
    empty = input.new_empty(0)
    return loss.to(input.dtype), log_prob.to(input.dtype), empty, empty.clone()


@reference
def npu_cross_entropy_loss_backward(
    grad_loss,
    log_prob,
    target,
    weight=None,
    grad_zloss=None,
    lse_for_zloss=None,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale_for_zloss=0.0,
):
    assert weight is None and grad_zloss is None and reduction == "none"
    grad = log_prob.float().exp()
    grad[torch.arange(len(target)), target] -= 1
    return (grad * grad_loss.float()[:, None]).to(log_prob.dtype)


@reference
def npu_grouped_matmul(x, weight, *, bias=None, group_list=None, split_item=0, group_type=None, group_list_type=0, **others):
    """One tensor each; groups of rows (0) or of the dim that is summed (2). group_list: sizes (1) or running sums (0)."""
    assert bias is None and len(x) == len(weight) == 1 and split_item in (2, 3) and group_list.dtype == torch.int64
    assert all(value is None or value == 0 for value in others.values()), others
    assert len(group_list) > 1, "the length of group_list may not be 1"
    (a,), (b,) = x, weight
    ends = (group_list.cumsum(0) if group_list_type == 1 else group_list).tolist()
    spans = list(zip([0, *ends], ends))
    if group_type == 0:
        assert b.dim() == 3 and a.shape[1] == b.shape[1] and len(b) == len(spans)
        out = a.new_zeros(len(a), b.shape[2])
        for (first, last), matrix in zip(spans, b):
            out[first:last] = (a[first:last].float() @ matrix.float()).to(a.dtype)
        return [out]
    assert group_type == 2 and a.shape[1] == b.shape[0] and a.stride(0) == 1, "k groups want a transposed view as x"
    return [torch.stack([(a[:, first:last].float() @ b[first:last].float()).to(a.dtype) for first, last in spans])]


@reference
def npu_moe_token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    """sorted_indices[i]: the row to which copy i went."""
    assert not padded_mode and num_out_tokens in (None, 0)
    flat = indices.flatten()
    order = flat.sort(stable=True).indices
    return tokens[order // (indices.numel() // len(tokens))], order.argsort().to(torch.int32)


@reference
def npu_moe_token_permute_grad(tokens, grad_permuted_tokens, indices, sorted_indices, padded_mode=False):
    return npu_moe_token_permute_grad_v2(
        grad_permuted_tokens, sorted_indices, len(tokens), tokens.dtype, sorted_indices.numel() // len(tokens)
    )


@reference
def npu_moe_token_permute_grad_v2(grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, num_topK, padded_mode=False):
    copies = grad_permuted_tokens.float()[sorted_indices.long()]
    return copies.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


@reference
def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    assert not padded_mode and restore_shape is None and sorted_indices.dtype == torch.int32
    copies = permuted_tokens.float()[sorted_indices.long()]
    if probs is not None:
        copies = copies.view(*probs.shape, -1) * probs.float()[..., None]
        copies = copies.sum(1)
    return copies.to(permuted_tokens.dtype)


@reference
def _npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    return npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens.clone()


@reference
def npu_moe_token_unpermute_grad(
    permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
):
    place, above = sorted_indices.long(), grad_unpermuted_tokens.float()
    weights = torch.ones(len(above), 1) if probs is None else probs.float()
    back = torch.empty(permuted_tokens.shape)
    back[place] = (above[:, None] * weights[..., None]).flatten(0, 1)
    if probs is None:
        return back.to(permuted_tokens.dtype), permuted_tokens.new_empty(0)
    grad_probs = (permuted_tokens.float()[place].view(*probs.shape, -1) * above[:, None]).sum(-1)
    return back.to(permuted_tokens.dtype), grad_probs.to(probs.dtype)


@reference
def npu_moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens,
    sorted_indices,
    permuted_tokens_size_0,
    permuted_tokens_dtype,
    probs=None,
    padded_mode=False,
    restore_shape=None,
    permuted_tokens=None,
):
    if permuted_tokens is None:
        permuted_tokens = torch.zeros(permuted_tokens_size_0, grad_unpermuted_tokens.shape[1], dtype=permuted_tokens_dtype)
    return npu_moe_token_unpermute_grad(permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs)


@reference
def npu_gather_backward(grad, self_size, dim, index, sparse_grad):
    """The gradient of torch.gather, for which torch_npu has a node of its own."""
    assert not sparse_grad
    return torch.zeros(tuple(self_size), dtype=grad.dtype).scatter_add(dim, index, grad)


@reference
def npu_moe_gating_top_k_softmax(x, finished=None, k=1):
    assert finished is None
    values, ids = torch.softmax(x.float(), -1).topk(k, -1)
    rows = torch.arange(len(x) * k).view(k, len(x)).t().contiguous()
    return values.to(x.dtype), ids.to(torch.int32), rows.to(torch.int32)


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
