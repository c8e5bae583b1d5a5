"""Attention of one token per row over its own number of keys, against the attention op row by row."""

import pytest
import torch

from llmtrain.ops import KeyLengths, Mask
from llmtrain.ops.attention import attention_reference
from llmtrain.ops.decode_attention import decode_attention_products, decode_attention_reference, decode_attention_sdpa

IMPLEMENTATIONS = [decode_attention_reference, decode_attention_sdpa, decode_attention_products]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [(9, 3, 1), (6, 6, 6), (1,)])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("width", [8, 5])
def test_each_row_sees_its_own_keys(attention, lengths, window, dtype, close, width):
    torch.manual_seed(0)
    q = torch.randn(len(lengths), 6, 1, 8).to(dtype)
    k, v = (torch.randn(len(lengths), 2, max(lengths), d).to(dtype) for d in (8, width))
    out = attention(q, k, v, lengths=KeyLengths(lengths), window=window, scale=0.4)
    assert out.dtype == dtype and out.shape == (len(lengths), 6, 1, width)
    for row, n in enumerate(lengths):
        one = (q[row : row + 1].double(), k[row : row + 1, :, :n].double(), v[row : row + 1, :, :n].double())
        expected = attention_reference(*one, mask=Mask(window=window), scale=0.4, q_offset=n - 1)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_what_does_not_fit_is_refused(attention):
    q, k = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8)
    for bad in (KeyLengths((5,)), KeyLengths((4, 3))):
        with pytest.raises(ValueError, match="decode_attention"):
            attention(q, k, k, lengths=bad)
