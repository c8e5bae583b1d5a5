"""aten ops on the stand-in are the CPU's, forward and backward: what a wrong number in another test of this tier cannot be blamed on."""

import pytest
import stand_in

stand_in.start()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

OPS = {
    "argsort": lambda x, ids, counts: x.argsort(),
    "argsort, stable": lambda x, ids, counts: ids.argsort(stable=True, descending=True),
    "bmm": lambda x, ids, counts: x[None].expand(3, 5, 6) @ x.t(),
    "bf16": lambda x, ids, counts: (x.bfloat16() @ x.bfloat16().t()).float(),
    "bincount": lambda x, ids, counts: torch.bincount(ids, minlength=12),
    "conjugate": lambda x, ids, counts: torch.view_as_real(torch.view_as_complex(x.view(5, 3, 2)).conj() * 2),
    "contiguous": lambda x, ids, counts: x.t().contiguous(),
    "cross_entropy": lambda x, ids, counts: F.cross_entropy(x, counts),
    "cumsum": lambda x, ids, counts: x.cumsum(0),
    "einsum": lambda x, ids, counts: torch.einsum("ij,kj->ik", x, x),
    "embedding": lambda x, ids, counts: F.embedding(counts, x),
    "foreach": lambda x, ids, counts: torch.stack(torch._foreach_norm([x, x])),
    "gather": lambda x, ids, counts: x.gather(1, x.argsort(1)),
    "gelu": lambda x, ids, counts: F.gelu(x, approximate="tanh"),
    "index": lambda x, ids, counts: x[counts],
    "index_add": lambda x, ids, counts: torch.zeros_like(x).index_add_(0, counts, x),
    "layer_norm": lambda x, ids, counts: F.layer_norm(x, (6,)),
    "logaddexp": lambda x, ids, counts: torch.logaddexp(x, -x),
    "logsumexp": lambda x, ids, counts: x.logsumexp(-1),
    "matmul": lambda x, ids, counts: x @ x.t(),
    "max": lambda x, ids, counts: x.max(1)[1],
    "nonzero": lambda x, ids, counts: torch.where(x > 0)[1],
    "norm": lambda x, ids, counts: x.norm(),
    "one_hot": lambda x, ids, counts: F.one_hot(ids, 9),
    "pow": lambda x, ids, counts: torch.pow(2.0, x),
    "repeat_interleave": lambda x, ids, counts: x.repeat_interleave(2, 0),
    "repeat_interleave by counts": lambda x, ids, counts: x.repeat_interleave(counts, 0, output_size=7),
    "rms_norm": lambda x, ids, counts: F.rms_norm(x, (6,)),
    "scatter_add": lambda x, ids, counts: torch.zeros_like(x).scatter_add(1, x.argsort(1), x),
    "sdpa": lambda x, ids, counts: F.scaled_dot_product_attention(*(x.view(1, 1, 5, 6) * s for s in (1, 2, 3)), is_causal=True),
    "searchsorted": lambda x, ids, counts: torch.searchsorted(counts.cumsum(0), ids),
    "silu": lambda x, ids, counts: F.silu(x),
    "softmax": lambda x, ids, counts: torch.softmax(x, -1, dtype=torch.float64),
    "sort": lambda x, ids, counts: x.sort()[0],
    "split": lambda x, ids, counts: torch.cat(x.split([2, 4], 1)[::-1], 1),
    "topk": lambda x, ids, counts: x.topk(2)[0],
    "unique": lambda x, ids, counts: ids.unique(),
    "where": lambda x, ids, counts: torch.where(x > 0, x, 0.0),
}


def inputs(device: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(5, 6, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    return x.to(device).requires_grad_(), ids.to(device), torch.tensor([1, 0, 3, 2, 1], device=device)


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_what_it_gives_on_the_cpu(name):
    there, here = inputs("cpu"), inputs("npu")
    expected, found = OPS[name](*there), OPS[name](*here)
    assert found.device.type == "npu" and found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected)
    if expected.requires_grad:
        expected.sum().backward()
        found.sum().backward()
        torch.testing.assert_close(here[0].grad.cpu(), there[0].grad)
