"""Plain formulas in the place of the NPU kernels of `npu::` ops: forward ones and those that torch_npu's autograd nodes call.

They follow the documentation in the wheel. Judging is not done with these but with `formulas.py`, which shares no code with them.
Tensors are CPU tensors over the device's memory; computed in fp32, as the kernels do, returned in the dtypes of the op.
Only what this project uses is served: anything else fails, and so does what the documentation calls an error.
"""

import npu_attention_references
import torch

REFERENCES = dict(npu_attention_references.REFERENCES)


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
