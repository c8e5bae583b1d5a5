"""The ops of tensor parallelism over ranks against the same formulas on whole tensors, which every rank draws alike."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tp_world import difference, worst

from llmtrain.ops.cross_entropy import cross_entropy_chunked, cross_entropy_reference
from llmtrain.parallel import ops
from llmtrain.parallel.ops import implementations, pending

WIDTHS = (12, 6, 10)


def in_world(jobs: dict[str, dict[str, dict]]) -> dict[str, dict[str, object]]:
    """Cases by function of this module and name, all in one world."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        function: {name: globals()[function](dist.group.WORLD, **case) for name, case in cases.items()} for function, cases in jobs.items()
    }
    dist.barrier()  # gloo's threads are done with the tensors of this interpreter before it ends
    dist.destroy_process_group()
    return results


def random(*sizes: int, seed: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(whole: torch.Tensor, group) -> torch.Tensor:
    """This rank's part of the sequence [B,S,...]."""
    return whole.chunk(group.size(), 1)[group.rank()].clone()


def largest(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    return {name: worst(difference(found, expected)) for name, (found, expected) in pairs.items()}


def plain(group, *, batch: int, length: int) -> dict[str, float]:
    """Gather, and scatter of sums, forward and backward."""
    ranks, me = group.size(), group.rank()
    x, partial = random(batch, length, 8, seed=1), [random(batch, length, 8, seed=10 + r) for r in range(ranks)]
    grads, shards = [random(batch, length, 8, seed=20 + r) for r in range(ranks)], random(batch, length, 8, seed=3)
    mine, summand = own(x, group).requires_grad_(), partial[me].clone().requires_grad_()
    gathered, scattered = ops.all_gather_sequence(mine, group), ops.reduce_scatter_sequence(summand, group)
    gathered.backward(grads[me])
    scattered.backward(own(shards, group))
    return largest(
        {
            "gathered": (gathered, x),
            "its gradient": (mine.grad, own(sum(grads), group)),
            "scattered": (scattered, own(sum(partial), group)),
            "its gradient, gathered": (summand.grad, shards),
        }
    )


def gather_matmul(group, *, batch: int, length: int, chunks: int, bias: bool = True, implementation: str = "chunked") -> dict[str, float]:
    """all_gather_matmul with three weights, one of them without a bias."""
    ranks, me = group.size(), group.rank()
    x = random(batch, length, 8, seed=1)
    weights = [[random(f, 8, seed=30 + 3 * r + i) for i, f in enumerate(WIDTHS)] for r in range(ranks)]
    biases = [random(f, seed=60 + me) if bias and i != 1 else None for i, f in enumerate(WIDTHS)]
    grads = [[random(batch, length, f, seed=90 + 3 * r + i) for i, f in enumerate(WIDTHS)] for r in range(ranks)]
    leaves = [own(x, group), *weights[me], *(b for b in biases if b is not None)]
    mine, *rest = (leaf.clone().requires_grad_() for leaf in leaves)
    own_weights, own_biases = rest[:3], ([rest[3], None, rest[4]] if bias else None)
    outs = ops.all_gather_matmul(mine, own_weights, own_biases, group=group, chunks=chunks, implementation=implementation)
    torch.autograd.backward(outs, grads[me])
    pairs = {f"out {i}": (out, F.linear(x, weights[me][i], biases[i])) for i, out in enumerate(outs)}
    pairs |= {f"dW {i}": (w.grad, torch.einsum("bsf,bsd->fd", grads[me][i], x)) for i, w in enumerate(own_weights)}
    pairs |= {f"db {i}": (b.grad, grads[me][i].sum((0, 1))) for i, b in enumerate(own_biases or ()) if b is not None}
    pairs["dx"] = (mine.grad, own(sum(g @ w for gs, ws in zip(grads, weights) for g, w in zip(gs, ws)), group))
    return largest(pairs)


def matmul_scatter(group, *, batch: int, length: int, chunks: int, implementation: str = "chunked") -> dict[str, float]:
    """matmul_reduce_scatter of a tensor with heads."""
    ranks, me = group.size(), group.rank()
    x = [random(batch, length, 3, 4, seed=1 + r) for r in range(ranks)]
    weights, grad = [random(8, 12, seed=30 + r) for r in range(ranks)], random(batch, length, 8, seed=50)
    mine, weight = x[me].clone().requires_grad_(), weights[me].clone().requires_grad_()
    out = ops.matmul_reduce_scatter(mine, weight, group=group, chunks=chunks, implementation=implementation)
    out.backward(own(grad, group))
    return largest(
        {
            "out": (out, own(sum(a.flatten(2) @ w.t() for a, w in zip(x, weights)), group)),
            "dx": (mine.grad.flatten(2), grad @ weights[me]),
            "dW": (weight.grad, torch.einsum("bsd,bsf->df", grad, x[me].flatten(2))),
        }
    )


def pair(group, *, batch: int, length: int, chunks: int) -> dict[str, float]:
    """The two with something position by position between them, in the order of arrival."""
    ranks, me = group.size(), group.rank()
    x, grad = random(batch, length, 8, seed=1), random(batch, length, 8, seed=2)
    up, down = [random(12, 8, seed=30 + r) for r in range(ranks)], [random(8, 12, seed=40 + r) for r in range(ranks)]
    whole = [t.clone().requires_grad_() for t in (x, *up, *down)]
    expected = sum(torch.tanh(whole[0] @ u.t()) @ d.t() for u, d in zip(whole[1 : 1 + ranks], whole[1 + ranks :]))
    expected.backward(grad)
    leaves = [t.clone().requires_grad_() for t in (own(x, group), up[me], down[me])]
    (hidden,) = ops.all_gather_matmul(leaves[0], [leaves[1]], group=group, chunks=chunks, ordered=False)
    out = ops.matmul_reduce_scatter(torch.tanh(hidden), leaves[2], group=group, chunks=chunks, batch=batch)
    out.backward(own(grad, group))
    return largest(
        {
            "out": (out, own(expected, group)),
            "dx": (leaves[0].grad, own(whole[0].grad, group)),
            "d up": (leaves[1].grad, whole[1 + me].grad),
            "d down": (leaves[2].grad, whole[1 + ranks + me].grad),
        }
    )


def symmetric(group, **case) -> dict[str, float]:
    """symm_mem with torch's own plain versions of its two operators, which it has for meta tensors, registered for the CPU."""
    assert "cuda alone" in implementations.SymmetricMemory.unavailable(implementations.Demand("cpu", 2))
    import torch.distributed._symmetric_memory as plain_versions

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", plain_versions._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", plain_versions._fused_matmul_reduce_scatter_fallback, "CPU")
    found = gather_matmul(group, implementation="symm_mem", **case)
    return found | {f"scatter {k}": v for k, v in matmul_scatter(group, implementation="symm_mem", **case).items()}


class Copies(TorchDispatchMode):
    """Numbers of elements that copying ops write, but for what gloo itself copies while it is waited for."""

    def __init__(self):
        super().__init__()
        self.elements: list[int] = []
        self.wait = pending.Pending.wait

    def __enter__(self):
        def wait(waiting):
            before = len(self.elements)
            result = self.wait(waiting)
            del self.elements[before:]
            return result

        pending.Pending.wait = wait
        return super().__enter__()

    def __exit__(self, *error):
        pending.Pending.wait = self.wait
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy"):
            self.elements.append(out.numel())
        return out


def copies(group, *, batch: int, chunks: int) -> dict[str, list[int]]:
    """Elements copied in forward and backward by an all_gather_matmul and a matmul_reduce_scatter, in order and in the order of arrival."""
    found: dict = {"ranks": group.size()}
    for ordered in (True, False):
        x, up, down = (random(*s, seed=1).requires_grad_() for s in ((batch, 4, 16), (12, 16), (16, 12)))
        with Copies() as forward:
            (hidden,) = ops.all_gather_matmul(x, [up], group=group, chunks=chunks, ordered=ordered)
            out = ops.matmul_reduce_scatter(hidden, down, group=group, chunks=chunks, batch=None if ordered else batch)
        grad = torch.ones_like(out)
        with Copies() as backward:
            torch.autograd.grad(out, (x, up, down), grad)
        found["in order" if ordered else "as they arrive"] = [sum(forward.elements), sum(backward.elements)]
    return found


@contextmanager
def logged(log: list[str]):
    """Starts, waits and products of the chunked implementation, in `log`."""
    started = {name: getattr(implementations, name) for name in ("start_gather", "start_scatter_sum")}
    wait, numbers = pending.Pending.wait, {}

    def start(name):
        def call(rows, group, *, out=None):
            result = started[name](rows, group, out=out)
            numbers[id(result)] = f"{name[6:]} {sum(entry.startswith(name[6:]) for entry in log)}", result
            log.append(numbers[id(result)][0])
            return result

        return call

    def waited(self):
        log.append(f"wait {numbers[id(self)][0]}") if id(self) in numbers else None
        return wait(self)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::mm":
                log.append("mm")
            return func(*args, **(kwargs or {}))

    implementations.start_gather, implementations.start_scatter_sum = start("start_gather"), start("start_scatter_sum")
    pending.Pending.wait = waited
    try:
        with Products():
            yield
    finally:
        for name, function in started.items():
            setattr(implementations, name, function)
        pending.Pending.wait = wait


def timeline(group, *, chunks: int) -> dict[str, list[str]]:
    """What is started, waited for and multiplied, in order."""
    x, up, down = (random(*s, seed=1).requires_grad_() for s in ((1, 8, 16), (12, 16), (16, 12)))
    found: dict[str, list[str]] = {name: [] for name in ("gather_mm", "mm_scatter", "gather_mm backward", "mm_scatter backward")}
    with logged(found["gather_mm"]):
        (hidden,) = ops.all_gather_matmul(x, [up], group=group, chunks=chunks)
    inner = hidden.detach().requires_grad_()
    with logged(found["mm_scatter"]):
        out = ops.matmul_reduce_scatter(inner, down, group=group, chunks=chunks)
    with logged(found["mm_scatter backward"]):
        out.sum().backward()
    with logged(found["gather_mm backward"]):
        hidden.backward(inner.grad)
    return found


def loss(group, *, vocab: int = 61, chunk: int = 5, scale: float = 1.0, none: bool = False, dtype: str = "float64") -> dict[str, float]:
    """vocab_cross_entropy against the whole vocabulary's, as share of the largest number; the second backward pass over the graph too."""
    kind, batch, length, hidden = getattr(torch, dtype), 2, 12, 8
    x = (scale * random(batch, length, hidden, seed=1)).to(kind)
    weight = random(vocab, hidden, seed=2).to(kind)
    targets = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(3))
    targets[:, 2:5] = -100
    if none:
        targets[:] = -100
    whole = [t.clone().requires_grad_() for t in (x, weight)]
    reference = cross_entropy_reference if kind == torch.float64 else cross_entropy_chunked
    expected = reference(whole[0].flatten(0, 1), whole[1], targets.flatten(), chunk=chunk)
    (0.3 * expected).backward()
    mine, part = own(x, group).requires_grad_(), weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    how = {"vocab_size": vocab, "group": group, "chunk": chunk}
    found = ops.vocab_cross_entropy(mine, part, targets, **how)
    first = torch.autograd.grad(0.3 * found, (mine, part), retain_graph=True)
    again = torch.autograd.grad(0.3 * found, (mine, part))
    with torch.no_grad():
        alone = ops.vocab_cross_entropy(mine, part, targets, **how)
    parts = own(whole[0].grad, group), whole[1].grad.chunk(group.size())[group.rank()]
    numbers: list = [None] * group.size()
    dist.all_gather_object(numbers, found.item())
    assert len({n.hex() for n in numbers}) == 1, numbers
    return largest(
        {"loss": (found, expected), "without gradients": (alone, expected)}
        | {f"d {name}": (g, e) for name, g, e in zip(("hidden", "weight"), first, parts)}
        | {f"d {name} again": (g, e) for name, g, e in zip(("hidden", "weight"), again, parts)}
    )


def vocabulary(group, *, vocab: int) -> dict[str, float]:
    """Embedding and whole logits over a vocabulary that ranks share, forward and backward."""
    table, tokens = random(vocab, 8, seed=1), torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(3))
    grad, part = random(2, 12, 8, seed=2), table.chunk(group.size())[group.rank()].clone().requires_grad_()
    whole = table.clone().requires_grad_()
    F.embedding(tokens, whole).backward(grad)
    found = ops.vocab_embedding(tokens, part, vocab_size=vocab, group=group)
    found.backward(own(grad, group))
    logits, above = random(2, 12, vocab, seed=5), random(2, 12, vocab, seed=6)
    mine = logits.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    joined = ops.gather_vocabulary(mine, vocab_size=vocab, group=group)
    joined.backward(above)
    return largest(
        {
            "embedding": (found, own(F.embedding(tokens, table), group)),
            "d table": (part.grad, whole.grad.chunk(group.size())[group.rank()]),
            "logits": (joined, logits),
            "d logits": (mine.grad, above.chunk(group.size(), -1)[group.rank()]),
        }
    )
