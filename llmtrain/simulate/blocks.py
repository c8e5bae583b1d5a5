"""The operators and collectives of one block, and of the ends of a model: embedding, head and loss, multi-token prediction."""

from collections.abc import Iterator
from functools import lru_cache
from math import lcm

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import mean_keys
from llmtrain.simulate.case import Case
from llmtrain.simulate.mixtures import experts, network
from llmtrain.simulate.recomputed import again
from llmtrain.simulate.work import ATTENTION, PASS, PRODUCT, Item, Send, Work

SOFTMAX, USUAL_WIDTH = 160, 256
"""What the exponential of a score costs, in numbers of the heads' two widths; and the sum of these to which attention's rate refers.
FlashAttention-3 (arXiv 2407.08608, figure 5) reaches two thirds of its rate for heads of 128 with heads of 64."""
SHORT = 300
"""Keys that attention could see beside the mean ones in the time of its start and its diagonal (same figure: 76% at 2K, 95% at 8K)."""
RING_LAUNCHES = 16
"""Operators that merge the results of a step of the ring."""


@lru_cache(maxsize=4096)
def block_work(case: Case, *, dense: bool) -> Work:
    """Of one block; `dense` is one of the first blocks of a mixture of experts, or any block of a dense model."""
    model = case.model.of_block(0) if dense else case.model
    work = Work()
    _attention(work, model, case)
    if model.ffn.kind == "moe":
        experts(work, model, case)
    else:
        network(work, model, case, width=model.ffn.hidden, tp=case.tp, rows=case.rows)
        _tp_sends(work, "ffn", case, width=model.hidden)
    _between(work, model, case)
    work.again, work.again_sends = again(work, case)
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
    _context_sends(work, model, case, heads=heads, kv=kv)
    narrow = (a.query_rank or hidden) + a.kv_rank if a.kind == "mla" else hidden
    _tp_sends(work, "attention", case, width=narrow)


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
    width, keys = model.head_dim + case.value_width(model), mean_keys(model, case.seq_len)
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


def _context_sends(work: Work, model: ModelConfig, case: Case, *, heads: float, kv: float) -> None:
    """Keys and values of the other ranks of cp, and their gradients' way back; or heads for sequence."""
    if case.cp == 1:
        return
    rows, e, d, dv = case.rows, case.width, model.head_dim, model.value_head_dim
    if case.cp_kind == "ulysses":
        there = rows * (d * heads + (d + dv) * lcm(max(1, round(kv)), case.cp)) * e
        work.send("heads", "all_to_all", "cp", there)
        work.send("heads back", "all_to_all", "cp", rows * dv * heads * e)
        return
    size = rows * kv * (d + dv) * e
    work.forward_sends.append(Send("keys and values", "all_gather", "cp", size, "cp"))
    if case.cp_kind == "ring":  # they go round again, and sums of their gradients, in fp32, with them
        work.backward_sends.append(Send("keys and values", "all_gather", "cp", size, "cp"))
        size *= max(4, e) / e
    work.backward_sends.append(Send("their gradients", "reduce_scatter", "cp", size, "cp"))


def _tp_sends(work: Work, name: str, case: Case, *, width: float) -> None:
    """The sums over tp of a branch: a reduce-scatter and an all-gather of what sequence parallelism splits, or an all-reduce.

    width: of what is gathered: D, or of latent attention the narrow vectors.
    """
    if case.tp == 1:
        return
    size, gathered = (case.rows * one * case.width for one in (case.model.hidden, width))
    if not case.spread:
        work.send(f"{name} sum", "all_reduce", "tp", size, "tp", after="behind")
        return
    # Gradients of the branch's input are summed beside the product for its weights' gradients.
    work.send(f"{name} gather", "all_gather", "tp", gathered / case.tp, "tp", back="reduce_scatter", after="behind")
    work.send(f"{name} scatter", "reduce_scatter", "tp", size / case.tp, "tp", back="all_gather")
    # The branch's input is gathered again for its weights' gradients, beside the product for its input.
    work.backward_sends.append(Send(f"{name} again", "all_gather", "tp", gathered / case.tp, "behind"))


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
