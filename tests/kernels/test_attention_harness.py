"""The harness itself: what is right passes, and one wrong bit of the mask does not."""

import pytest
import torch
from attention_call import AttentionCall
from attention_calls import Matrix, calls
from attention_formula import formula, seen
from attention_harness import check, check_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtrain_kernels.mask import Mask

SMALL = Matrix(tile=4, longest=18, head_dims=((8, 8), (12, 8)))


def by_torch(q, k, v, *, mask, scale=None, q_offset=0, kv_offset=0, return_lse=False, flip=None):
    """Attention with the S x T mask, of which one bit may be flipped."""
    queries, keys = range(q_offset, q_offset + q.shape[2]), range(kv_offset, kv_offset + k.shape[2])
    visible = seen(mask, rows=q.shape[0], queries=queries, keys=keys).clone()
    if flip is not None:
        visible[flip] ^= True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    empty = ~visible.any(-1)[:, None, :, None]
    scores = scores.masked_fill(~visible[:, None] & ~empty, float("-inf"))
    lse = torch.logsumexp(scores, -1, keepdim=True)
    out = ((scores - lse).exp() @ v.double()).masked_fill(empty, 0).to(q.dtype)
    lse = lse.masked_fill(empty, float("-inf")).squeeze(-1)
    return (out, lse) if return_lse else out


@settings(max_examples=60, deadline=None)
@given(call=calls(SMALL))
def test_right_attention_passes(call):
    check(by_torch, call, dtype=torch.float64)
    check_mask(by_torch, call)


@settings(max_examples=60, deadline=None)
@given(call=calls(SMALL), data=st.data())
def test_any_wrong_bit_is_found(call, data):
    place = tuple(data.draw(st.integers(0, size - 1)) for size in (call.rows, call.queries, call.keys))

    def wrong(*args, **options):
        return by_torch(*args, **options, flip=place)

    with pytest.raises(AssertionError, match="1 pairs differ"):
        check_mask(wrong, call, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        check(wrong, call, dtype=torch.float64)


def test_gradients_of_the_formula_are_those_of_its_values():
    call = AttentionCall(Mask(documents=((3, 4),), window=2), heads=2, queries=4, keys=3, d=3, dv=2, q_offset=1)
    tensors = [torch.randn(1, heads, n, d, dtype=torch.float64, requires_grad=True) for heads, n, d in ((2, 4, 3), (1, 3, 3), (1, 3, 2))]
    options = call.options() | {"mask": Mask(documents=((2, 3),), window=2)}
    torch.autograd.gradcheck(lambda *x: formula(*x, **options), tensors)
