"""Attention over ranks of cp against one process: every rank draws the same whole rows and compares what it gets with the reference."""

import sys
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

from llmtrain.config.model import ModelConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.data.shifted import shifted
from llmtrain.errors import UserError
from llmtrain.model import build, initialise
from llmtrain.model.objective import cross_entropy as objective
from llmtrain.ops import Call, Mask, resolve
from llmtrain.ops.attention import attention_reference
from llmtrain.parallel import cp_exchange, cp_ring
from llmtrain.parallel.cp import ContextParallel, apply_cp
from llmtrain.parallel.ops.pending import Pending
from llmtrain.parallel.recompute import apply_recompute

SIZES = {"heads": 4, "kv_heads": 2, "d": 8, "dv": 8}


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


def in_world(jobs: dict[str, tuple[str, dict]]) -> dict[str, object]:
    """Several functions of this module, one after the other in one world: name -> (function, arguments) gives name -> result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {name: globals()[function](**arguments) for name, (function, arguments) in jobs.items()}
    dist.destroy_process_group()
    return results


def differences(cases: list[dict], fault: str | None = None) -> list[dict]:
    """Largest difference of output, dq, dk, dv per case, as a share of the largest number in it, over all ranks."""
    if fault:
        with FAULTS[fault]():
            return differences(cases)
    group, results = dist.group.WORLD, []
    for case in cases:
        dtype = getattr(torch, case.get("dtype", "float64"))
        mask = Mask(documents=case["documents"], window=case.get("window"))
        sizes = SIZES | case.get("sizes", {})
        *tensors, grad = draw(mask.documents, **sizes, dtype=dtype)
        cp = ContextParallel(group, case["kind"], ops=ops_for(dtype, case.get("kernels")), multiple=case.get("multiple", 1))
        expected = whole([x.double() for x in tensors], grad.double(), mask)
        found = parted(cp, tensors, grad, mask)
        results.append(dict(zip(("out", "dq", "dk", "dv"), worst([difference(a, b) for a, b in zip(found, expected)]))))
    return results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item() if a.isfinite().all() else float("inf")


def worst(values: list[float]) -> list[float]:
    """Each value's largest over the ranks."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return [max(column) for column in zip(*gathered)]


def merge_without_lse():
    """Parts are averaged, however much of the softmax each holds."""

    def average(out, lse, part, part_lse):
        out.add_(part).mul_(0.5)
        lse.copy_(torch.logaddexp(lse, part_lse))

    return mock.patch.object(cp_ring, "_merge", average)


def own_gradient_alone():
    """What other ranks found for this rank's keys is lost on the way."""
    wait = cp_ring._Passing.wait

    def lose(self):
        received = wait(self)
        return received * 0 if sys._getframe(1).f_code.co_name == "backward" else received

    return mock.patch.object(cp_ring._Passing, "wait", lose)


def scatter_without_sum():
    """Every rank keeps its own gradient of its own keys."""

    def keep(joined, group):
        return Pending(joined.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone())

    return mock.patch.object(cp_exchange, "start_scatter_sum", keep)


FAULTS = {"merge": merge_without_lse, "passing": own_gradient_alone, "scatter": scatter_without_sum}


def traffic(cases: list[dict]) -> list[dict]:
    """Bytes that one rank sends in the forward and in the backward pass of attention, by kind, and the collectives it calls."""
    group, results = dist.group.WORLD, []
    for case in cases:
        dtype = getattr(torch, case["dtype"])
        mask = Mask(documents=case["documents"])
        *tensors, grad = draw(mask.documents, **(SIZES | case.get("sizes", {})), dtype=dtype)
        cp = ContextParallel(group, case["kind"], ops=ops_for(dtype))
        q, k, v, above = (_by_rows(cp.split_tensor(x.transpose(1, 2), mask.documents, 0.0)) for x in (*tensors, grad))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with Counting(dist.get_world_size()) as forward:
            out = cp.attend(*leaves, mask=mask)
        with Counting(dist.get_world_size()) as backward:
            torch.autograd.grad(out, leaves, above)
        results.append({"forward": forward.sent, "backward": backward.sent, "calls": forward.calls + backward.calls})
    return results


class Counting:
    """Counts what this rank sends, by wrapping the functions of torch.distributed that attention calls."""

    def __init__(self, ranks: int):
        share = (ranks - 1) / ranks
        self.sent, self.calls = 0, []
        self._bytes = {
            "all_gather_single": lambda out, sent, **_: sent.nbytes * (ranks - 1),
            "reduce_scatter_single": lambda out, sent, **_: round(sent.nbytes * share),
            "all_gather_into_tensor": lambda out, sent, **_: sent.nbytes * (ranks - 1),
            "reduce_scatter_tensor": lambda out, sent, **_: round(sent.nbytes * share),
            "all_to_all_single": lambda out, sent, **_: round(sent.nbytes * share),
            "batch_isend_irecv": lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend),
        }
        self._originals = {name: getattr(dist, name) for name in self._bytes if hasattr(dist, name)}

    def __enter__(self):
        for name, original in self._originals.items():
            setattr(dist, name, partial(self._call, name, original))
        return self

    def _call(self, name, original, *args, **options):
        self.sent += self._bytes[name](*args, **options)
        self.calls.append(name)
        return original(*args, **options)

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)


MODEL = {
    "vocab_size": 61,
    "layers": 3,
    "hidden": 32,
    "max_seq_len": 64,
    "attention": {"heads": 4, "kv_heads": 2, "qk_norm": True},
    "ffn": {"hidden": 40},
    "init": {"std": 0.2},
}


def build_model(changes: dict) -> torch.nn.Module:
    cfg = ModelConfig.model_validate(MODEL | changes)
    with torch.device("meta"):
        model = build(cfg, ops_for(torch.float64), 5).to(torch.float64)
    model.to_empty(device="cpu")
    initialise(model, cfg, 3)
    return model


def some_batch(documents, *, rows: int, length: int) -> Batch:
    random = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 61, (2, rows, length), generator=random)
    targets[:, ::5] = NO_TARGET
    lengths = documents or ((length,),) * rows
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return Batch(tokens, targets, positions, documents, tuple(range(rows)))


def run_model(model, batch, *, ahead: bool):
    """Loss, logits and gradients of every parameter."""
    pairs = {"ahead": (shifted(batch, 1),)} if ahead else {}
    mask = Mask(documents=batch.documents)
    outputs = model(batch.tokens, positions=batch.positions, targets=batch.targets, mask=mask, **pairs)
    objective(outputs).backward()
    with torch.no_grad():
        logits = model(batch.tokens, positions=batch.positions, mask=mask)["logits"]
    return objective(outputs).detach(), logits, {name: p.grad for name, p in model.named_parameters()}


def models(cases: list[dict]) -> list[dict]:
    """A whole model over ranks of cp against one process: loss, logits and the worst gradient; and how often a layout was made."""
    group, results = dist.group.WORLD, []
    for case in cases:
        changes, recompute = case.get("changes", {}), case.get("recompute", "none")
        batch = some_batch(case["documents"], rows=2, length=case.get("length", 48))
        ahead = bool(changes.get("mtp"))
        loss, logits, gradients = run_model(build_model(changes), batch, ahead=ahead)
        model = build_model(changes)
        cp = ContextParallel(group, case["kind"], ops=ops_for(torch.float64))
        apply_cp(model, cp)
        apply_recompute(model, recompute)
        local = cp.split(batch)
        assert local.documents == (batch.documents or ((batch.tokens.shape[1],),) * 2) and local.samples == batch.samples
        mask = Mask(documents=local.documents)
        pair = shifted(batch, 1)
        pairs = {"ahead": ((cp.split_tensor(pair[0], batch.documents, 0), cp.split_tensor(pair[1], batch.documents, NO_TARGET)),)}
        outputs = model(local.tokens, positions=local.positions, targets=local.targets, mask=mask, **(pairs if ahead else {}))
        objective(outputs).backward()
        total = objective(outputs).detach()
        dist.all_reduce(total)
        with torch.no_grad():
            mine = model(local.tokens, positions=local.positions, mask=mask)["logits"]
        joined = cp.join(mine, batch.documents, batch.tokens.shape[1])
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        found = [difference(parameter.grad, gradients[name]) for name, parameter in model.named_parameters()]
        values = worst([difference(total, loss), difference(joined, logits), max(found)])
        results.append(dict(zip(("loss", "logits", "gradients"), values)) | {"layouts": cp.layouts_made})
    return results


def refusals() -> list[str]:
    """What is refused, and with which words; on 2 ranks, of which each sees the same."""
    group, said = dist.group.WORLD, []
    window = {"attention": MODEL["attention"] | {"window": 8}}
    three = {"attention": {"heads": 6, "kv_heads": 3}, "hidden": 48}
    q = torch.zeros(1, 4, 4, 8)
    mask = Mask(documents=((8,),))

    def say(call) -> None:
        try:
            call()
        except (UserError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing was refused")

    def cp(kind, **options):
        return ContextParallel(group, kind, ops=ops_for(torch.float32), **options)

    say(lambda: cp("spiral"))
    say(lambda: apply_cp(build_model(window), cp("ring")))
    say(lambda: apply_cp(build_model(three), cp("ulysses", multiple=2)))
    say(lambda: cp("all_gather").attend(q, q, q, mask=mask, cache=object()))
    say(lambda: cp("all_gather").attend(q, q, q, mask=Mask()))
    say(lambda: cp("all_gather").attend(q[:, :, :3], q[:, :, :3], q[:, :, :3], mask=mask))
    return said
