"""Attention over ranks of cp against one process: every rank draws the same whole rows and compares what it gets with the reference."""

import torch
import torch.distributed as dist

from llmtrain.ops import Call, Mask, resolve
from llmtrain.ops.attention import attention_reference
from llmtrain.parallel.cp import ContextParallel


def start() -> dist.ProcessGroup:
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.group.WORLD


def ops_for(dtype: torch.dtype, kernels: dict | None = None):
    return resolve(kernels or {}, Call(device="cpu", dtype=dtype, documents=True))


def draw(documents, *, heads, kv_heads, d, dv, dtype, seed=0):
    """q, k, v of whole rows and a gradient of the output, the same on every rank."""
    torch.manual_seed(seed)
    rows, length = len(documents), sum(documents[0])
    sizes = [(rows, heads, length, d), (rows, kv_heads, length, d), (rows, kv_heads, length, dv), (rows, heads, length, dv)]
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def whole(tensors, grad, mask):
    """Output and gradients in one process."""
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    out = attention_reference(q, k, v, mask=mask)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def parted(cp, tensors, grad, mask):
    """The same, computed over ranks and joined again."""
    q, k, v, above = (_by_rows(cp.split_tensor(x.transpose(1, 2), mask.documents, 0.0)) for x in (*tensors, grad))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = cp.attend(q, k, v, mask=mask)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), above)]
    return [_by_rows(cp.join(_by_rows(x), mask.documents, sum(mask.documents[0]))) for x in found]


def _by_rows(x):
    return x.transpose(1, 2)


def differences(cases: list[dict]) -> list[dict]:
    """Largest difference of output, dq, dk, dv per case, as a share of the largest number in it, over all ranks."""
    group = start()
    results = []
    for case in cases:
        dtype = getattr(torch, case.get("dtype", "float64"))
        mask = Mask(documents=case["documents"], window=case.get("window"))
        sizes = {"heads": 4, "kv_heads": 2, "d": 8, "dv": 8} | case.get("sizes", {})
        *tensors, grad = draw(mask.documents, **sizes, dtype=dtype)
        cp = ContextParallel(group, case["kind"], ops=ops_for(dtype, case.get("kernels")), multiple=case.get("multiple", 1))
        expected = whole([x.double() for x in tensors], grad.double(), mask)
        found = parted(cp, tensors, grad, mask)
        worst = [((a - b).abs().max() / b.abs().max()).item() if a.isfinite().all() else float("inf") for a, b in zip(found, expected)]
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, worst)
        results.append(dict(zip(("out", "dq", "dk", "dv"), map(max, *gathered))))
    dist.destroy_process_group()
    return results
