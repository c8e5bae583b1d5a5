"""The operators of a block and of the ends of a model, and what they move: FLOPs, bytes, kernels, collectives. No times.

T tokens of a micro-batch on a rank of cp, T / t on a rank of tp where sequence parallelism splits what lies between the branches; D hidden;
e bytes of an activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import mean_keys
from llmtrain.simulate.case import FP8, Case

SOFTMAX, USUAL_WIDTH = 160, 256
"""What the exponential of a score costs, in numbers of the heads' two widths; and the sum of these to which attention's rate refers.
FlashAttention-3 (arXiv 2407.08608, figure 5) reaches two thirds of its rate for heads of 128 with heads of 64."""
SHORT = 300
"""Keys that attention could see beside the mean ones in the time of its start and its diagonal (same figure: 76% at 2K, 95% at 8K)."""
RING_LAUNCHES = 16
"""Operators that merge the results of a step of the ring."""
GROUPED, PRODUCT, ATTENTION, PASS = "grouped", "product", "attention", "pass"


class Item(NamedTuple):
    """One operator, `count` times."""

    name: str
    kind: str
    """`product`, `grouped` (as many products of experts at once), `attention`, `pass` (bound by memory)."""
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    low: bool = False
    """Whether it is computed in fp8 where the case says so."""
    backward: bool = False


class Send(NamedTuple):
    """One collective of `size` bytes (see `layout.traffic.sent`) over an axis."""

    name: str
    kind: str
    axis: str
    size: float
    hides: str
    """What it may hide beside: `tp`, `cp`, `ep`, or `` for nothing."""


@dataclass
class Work:
    """What a part of the model does for one micro-batch on one rank."""

    forward: list[Item] = field(default_factory=list)
    inputs: list[Item] = field(default_factory=list)
    """Of the backward pass, what gives gradients of inputs."""
    weights: list[Item] = field(default_factory=list)
    again: list[Item] = field(default_factory=list)
    """What the backward pass computes again."""
    forward_sends: list[Send] = field(default_factory=list)
    backward_sends: list[Send] = field(default_factory=list)
    again_sends: list[Send] = field(default_factory=list)

    def product(
        self, name: str, *, m: float, n: float, k: float, count: int = 1, case: Case, kind: str = PRODUCT, low: bool = True
    ) -> None:
        """[m,k] by [k,n], `count` times, with both products of its backward pass; weights' gradients are added up in place."""
        e, low, padded = case.width, low and case.dtype == FP8, _padded(m, n, k)
        flops, moved = 2.0 * padded * count, e * (m * k + k * n + m * n) * count
        self.forward.append(Item(name, kind, flops, moved, 1, low))
        self.inputs.append(Item(name, kind, flops, moved, 1, low, True))
        update = 2.0 * case.habits.gradient_bytes * k * n * count
        self.weights.append(Item(name, kind, flops, e * (m * k + m * n) * count + update, 1, low, True))
        if low:  # activations and gradients in two layouts each, from 16 bits
            cast = 2 + 2 * 1.0
            self.forward.append(Item("casts", PASS, bytes=m * k * cast * count, launches=1))
            self.inputs.append(Item("casts", PASS, bytes=m * n * cast * count, launches=1))

    def passes(self, name: str, *, forward: float, backward: float, case: Case, launches: int = 1) -> None:
        """Element-wise work that moves so many bytes."""
        self.forward.append(Item(name, PASS, bytes=forward, launches=launches))
        self.inputs.append(Item(name, PASS, bytes=backward, launches=launches, backward=True))

    def send(self, name: str, kind: str, axis: str, size: float, hides: str = "", *, back: str | None = None, after: str = "") -> None:
        """A collective of the forward pass, and its mirror image `back` in the backward pass, which may hide beside something else."""
        self.forward_sends.append(Send(name, kind, axis, size, hides))
        self.backward_sends.append(Send(name, back or kind, axis, size, after or hides))


def _padded(m: float, n: float, k: float) -> float:
    """m n k as tiles of 128 rows and units of 16 columns compute them."""
    return -(-m // 16) * 16 * (-(-n // 16) * 16) * (-(-k // 16) * 16)


@lru_cache(maxsize=4096)
def block_work(case: Case, *, dense: bool) -> Work:
    """Of one block; `dense` is one of the first blocks of a mixture of experts, or any block of a dense model."""
    model = case.model.of_block(0) if dense else case.model
    work = Work()
    _attention(work, model, case)
    if model.ffn.kind == "moe":
        _experts(work, model, case)
    else:
        _network(work, model, case, width=model.ffn.hidden, tp=case.tp, rows=case.rows)
        _tp_sends(work, "ffn", case)
    _between(work, model, case)
    work.again, work.again_sends = _again(work, case)
    return work


def _between(work: Work, model: ModelConfig, case: Case) -> None:
    """Norms, residuals, dropout."""
    e, rows = case.width, case.rows / (case.tp if case.spread else 1)
    norms = 2 if model.norm.placement == "pre" else 4
    mask = 1 if case.habits.dropout else 0
    size = rows * model.hidden
    work.passes("norms", forward=norms * 2 * e * size, backward=norms * 3 * e * size, case=case, launches=norms)
    work.passes("residuals", forward=2 * (3 * e + mask) * size, backward=2 * (3 * e + mask) * size, case=case, launches=2)


def _attention(work: Work, model: ModelConfig, case: Case) -> None:
    a, tp, rows, e, hidden = model.attention, case.tp, case.rows, case.width, model.hidden
    heads, d, dv = a.heads / tp, model.head_dim, model.value_head_dim
    kv = max(1.0, model.kv_heads / tp)
    if a.kind == "mla":
        _latent(work, model, case, heads=heads)
    else:
        work.product("qkv", m=rows, n=(heads + 2 * kv) * d, k=hidden, case=case)
        moved = 2 * e * rows * (heads + kv) * d
        if model.position.kind == "rope":
            work.passes("rope", forward=moved, backward=moved, case=case, launches=2)
        if a.qk_norm:
            work.passes("norms", forward=moved, backward=1.5 * moved, case=case, launches=2)
        layout = 2 * e * rows * (heads + 2 * kv) * d
        work.passes("layout", forward=layout, backward=layout, case=case, launches=1)
    work.product("attention out", m=rows, n=hidden, k=heads * dv, case=case)
    _scores(work, model, case, heads=heads)
    if case.cp > 1:
        size = rows * kv * (d + dv) * e
        work.send("keys and values", "all_gather", "cp", size, "cp", back="all_gather")
        work.backward_sends.append(Send("keys and values", "reduce_scatter", "cp", size, "cp"))
    _tp_sends(work, "attention", case)


def _latent(work: Work, model: ModelConfig, case: Case, *, heads: float) -> None:
    """Projections of multi-head latent attention; the narrow ones on every rank of tp for its own tokens."""
    a, rows, hidden, e = model.attention, case.rows, model.hidden, case.width
    own = rows / (case.tp if case.spread else 1)
    if a.query_rank:
        work.product("q down", m=own, n=a.query_rank, k=hidden, case=case)
    work.product("q up", m=rows, n=heads * model.head_dim, k=a.query_rank or hidden, case=case)
    work.product("kv down", m=own, n=a.kv_rank + a.rope_dim, k=hidden, case=case)
    work.product("kv up", m=rows, n=heads * (a.nope_dim + a.value_dim), k=a.kv_rank, case=case)
    narrow = 2 * e * own * ((a.query_rank or 0) + a.kv_rank)
    work.passes("norms", forward=narrow, backward=1.5 * narrow, case=case, launches=2)
    wide = 2 * e * rows * heads * (2 * model.head_dim + a.value_dim)  # parts are joined for the kernel
    work.passes("rope", forward=wide, backward=wide, case=case, launches=6)


def _scores(work: Work, model: ModelConfig, case: Case, *, heads: float) -> None:
    """Scores, softmax and their product with the values."""
    rows, e = case.rows, case.width
    width, keys = model.head_dim + model.value_head_dim, mean_keys(model, case.seq_len)
    if case.habits.flash:
        flops = attention_flops(rows=rows, keys=keys, heads=heads, width=width)
        moved = e * rows * heads * width * 2
        ring = RING_LAUNCHES * (case.cp - 1) if case.cp_kind == "ring" else 0
        work.forward.append(Item("attention", ATTENTION, flops, moved, 1 + ring))
        work.inputs.append(Item("attention", ATTENTION, 2.5 * flops, 2 * moved, 2 + ring, backward=True))
        return
    entries = rows * case.seq_len * heads
    flops = 2.0 * entries * width
    mask = 1 if case.habits.dropout else 0
    forward, backward = e * (1 + 2 + 1) + mask * (2 * e + 1), e * (1 + 3 + 2 + 2) + mask * (2 * e + 1)
    work.forward += [Item("scores", PRODUCT, flops, 0, 2), Item("softmax", PASS, bytes=forward * entries, launches=3)]
    work.inputs += [
        Item("scores", PRODUCT, 2 * flops, 0, 4, backward=True),
        Item("softmax", PASS, bytes=backward * entries, launches=3, backward=True),
    ]


def attention_flops(*, rows: float, keys: float, heads: float, width: float) -> float:
    """Of the forward pass: products over the keys that are seen, with what short sequences and narrow heads cost besides."""
    return 2.0 * rows * (keys + SHORT) * heads * (width + SOFTMAX) * USUAL_WIDTH / (USUAL_WIDTH + SOFTMAX)


def _network(work: Work, model: ModelConfig, case: Case, *, width: float, tp: int, rows: float, name: str = "ffn") -> None:
    """A dense feed-forward network of `width` that tp ranks share."""
    gated, inside, e = model.ffn.activation == "swiglu", width / tp, case.width
    work.product(f"{name} in", m=rows, n=inside * (2 if gated else 1), k=model.hidden, case=case)
    forward, backward = (3, 5) if gated else (2, 3)
    work.passes("activation", forward=forward * e * rows * inside, backward=backward * e * rows * inside, case=case)
    work.product(f"{name} out", m=rows, n=model.hidden, k=inside, case=case)


def _tp_sends(work: Work, name: str, case: Case) -> None:
    """The sums over tp of a branch: a reduce-scatter and an all-gather of what sequence parallelism splits, or an all-reduce."""
    if case.tp == 1:
        return
    size = case.rows * case.model.hidden * case.width
    if not case.spread:
        work.send(f"{name} sum", "all_reduce", "tp", size, "tp", after="behind")
        return
    # Gradients of the branch's input are summed beside the product for its weights' gradients.
    work.send(f"{name} gather", "all_gather", "tp", size / case.tp, "tp", back="reduce_scatter", after="behind")
    work.send(f"{name} scatter", "reduce_scatter", "tp", size / case.tp, "tp", back="all_gather")
    # The branch's input is gathered again for its weights' gradients, beside the product for its input.
    work.backward_sends.append(Send(f"{name} again", "all_gather", "tp", size / case.tp, "behind"))


def _experts(work: Work, model: ModelConfig, case: Case) -> None:
    """Router, dispatch, experts, combine."""
    ffn, e, own = model.ffn, case.width, case.rows / (case.tp if case.spread or case.etp == 1 else 1)
    gated, width = ffn.activation == "swiglu", ffn.descend or model.hidden
    work.forward.append(Item("router", PASS, bytes=own * (model.hidden * e * 2 + ffn.experts * 4 * 8), launches=14))
    work.inputs.append(Item("router", PASS, bytes=own * (model.hidden * e * 4 + ffn.experts * 4 * 10), launches=14, backward=True))
    if ffn.descend:
        work.product("descend", m=own, n=ffn.descend, k=model.hidden, case=case)
        work.product("ascend", m=own, n=model.hidden, k=ffn.descend, case=case)
    if ffn.shared_experts:
        _network(work, model, case, width=ffn.shared_hidden, tp=1, rows=own, name="shared")
    rows = own * ffn.top_k * case.etp  # at the experts of a rank, on average
    local, inside = ffn.experts / case.ep, ffn.hidden / case.etp
    work.product("experts in", m=rows / local, n=inside * (2 if gated else 1), k=width, count=local, case=case, kind=GROUPED)
    forward, backward = (3, 5) if gated else (2, 3)
    work.passes("activation", forward=forward * e * rows * inside, backward=backward * e * rows * inside, case=case)
    work.product("experts out", m=rows / local, n=width, k=inside, count=local, case=case, kind=GROUPED)
    sorts = (2 if case.ep > 1 and local > 1 else 1) * 2  # before it is sent and at its expert, there and back
    moved = sorts * 2 * e * rows * width
    work.passes("permute", forward=moved, backward=moved, case=case, launches=8 * sorts)
    _dispatch(work, case, own=own, width=width)


def _dispatch(work: Work, case: Case, *, own: float, width: float) -> None:
    """Tokens to their experts and back."""
    ffn, e = case.model.ffn, case.width
    copies = ffn.top_k if case.habits.gathers_rows and case.ep > 1 else 1
    if case.etp > 1:
        gathered = own * width * e * copies
        work.send("experts gather", "all_gather", "tp", gathered, "tp", back="reduce_scatter")
        work.send("experts scatter", "reduce_scatter", "tp", gathered, "tp", back="all_gather")
    size = own * ffn.top_k * width * e * (case.etp if copies == 1 else 1)
    if case.ep == 1:
        return
    if case.hierarchical > 1:
        work.send("dispatch between nodes", "all_gather", "ep_outer", own * width * e, "ep", back="reduce_scatter")
        work.send("combine between nodes", "reduce_scatter", "ep_outer", own * width * e, "ep", back="all_gather")
        work.send("dispatch", "all_to_all", "ep_inner", size, "ep")
        work.send("combine", "all_to_all", "ep_inner", size, "ep")
        return
    kind = "once_per_node" if case.habits.sends_once else "all_to_all"
    work.send("dispatch", kind, "ep", size, "ep")
    work.send("combine", kind, "ep", size, "ep")


_NAMES = {
    "activation": ("activation",),
    "norms": ("norms",),
    "attention": ("attention", "scores", "softmax"),
    "mla_up": ("q up", "kv up", "rope"),
    "permute": ("permute",),
    "moe": ("router", "permute", "experts in", "experts out", "activation", "descend", "ascend", "shared in", "shared out"),
}


def _again(work: Work, case: Case) -> tuple[list[Item], list[Send]]:
    """What is computed and sent again in the backward pass."""
    what = case.recompute
    if "full" in what:
        return list(work.forward), list(work.forward_sends)
    if "half_products" in what:
        kept = [item for item in work.forward if item.kind == PASS]
        halves = [item._replace(flops=item.flops / 2, bytes=item.bytes / 2) for item in work.forward if item.kind in (PRODUCT, GROUPED)]
        return kept + halves, [send for send in work.forward_sends if send.kind != "reduce_scatter"]
    if "selective" in what:
        return [item for item in work.forward if item.kind == PASS], list(work.forward_sends)
    names = {name for option in what for name in _NAMES.get(option, ())}
    sent = ("dispatch",) if "permute" in what else ("dispatch", "combine") if "moe" in what else ()
    return [item for item in work.forward if item.name in names], [send for send in work.forward_sends if send.name in sent]


@lru_cache(maxsize=4096)
def head_work(case: Case) -> Work:
    """Output head and loss."""
    model, rows, e = case.model, case.rows, case.width
    words = model.vocab_size / case.tp
    work = Work()
    work.product("head", m=rows, n=words, k=model.hidden, case=case, low=False)
    passes = 8 if case.habits.chunked_loss else 18  # fp32 logits: cast, max, exp, sum, pick
    work.passes("loss", forward=passes * rows * words, backward=(passes / 2 + 2 * e) * rows * words, case=case, launches=10)
    work.passes("norms", forward=2 * e * rows * model.hidden, backward=3 * e * rows * model.hidden, case=case)
    if case.tp > 1:
        size = rows * model.hidden * e
        work.send("head", "all_gather", "tp", size / case.tp, "tp", back="reduce_scatter")
    return work


@lru_cache(maxsize=4096)
def embedding_work(case: Case) -> Work:
    """Token embedding."""
    rows, e, hidden = case.rows, case.width, case.model.hidden
    work = Work()
    work.passes("embedding", forward=2 * e * rows * hidden, backward=3 * e * rows * hidden, case=case, launches=3)
    if case.tp > 1:
        work.send(
            "embedding", "reduce_scatter" if case.spread else "all_reduce", "tp", rows * hidden * e / (case.tp if case.spread else 1), "tp"
        )
    return work


def mtp_work(case: Case) -> Iterator[Work]:
    """What a head of multi-token prediction has beside its block: a projection, norms, and another pass of the output head."""
    work = Work()
    own = case.rows / (case.tp if case.spread else 1)
    work.product("mtp projection", m=own, n=case.model.hidden, k=2 * case.model.hidden, case=case)
    yield work
    yield head_work(case)
