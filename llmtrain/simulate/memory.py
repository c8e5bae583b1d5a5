"""Bytes that the ranks of each pipeline stage hold at their peak: parameters, gradients, optimizer, activations, logits, buffers.

How many micro-batches of a block's activations (`activations.py`) exist at once follows from the schedule.
"""

from dataclasses import dataclass

from llmtrain.layout.schedule import build, peak_activations
from llmtrain.simulate.activations import kept
from llmtrain.simulate.case import Case
from llmtrain.simulate.held import Held, block_held, blocks_of, largest_tensors, rank_held, stages_of
from llmtrain.simulate.links import group

FRAGMENTS = 0.06
"""What the allocator holds beyond what tensors take, where reserved memory is what counts."""
WORKSPACE = 0.5 * 2**30
"""Of libraries: products and collectives."""


@dataclass(frozen=True)
class Memory:
    """Of one rank of the pipeline."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    fragments: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def memory(case: Case) -> list[Memory]:
    """Of every rank along pp."""
    counts, moe = in_flight(case), case.model.ffn.kind == "moe"
    blocks = (kept(case, dense=True) if not moe or case.model.ffn.dense_layers else 0.0, kept(case, dense=False) if moe else 0.0)
    both = _temporary(case) + _recomputed(case), blocks
    return [_of_rank(case, rank, counts[rank], *both) for rank in range(case.pp)]


def peak(case: Case) -> float:
    """Of the rank that holds most."""
    return max(one.total for one in memory(case))


def _of_rank(case: Case, rank: int, count: float, temporary: float, blocks: tuple[float, float]) -> Memory:
    held, habits = rank_held(case, rank), case.habits
    parameters, gradients, masters, moments = _state(case, held)
    last, first = case.rank_of(case.stages - 1) == rank, case.rank_of(0) == rank
    whole_rows = case.rows * case.model.hidden * 2
    activations = count * _mean_chunk(case, rank, blocks) + whole_rows / (case.tp if case.spread else 1) * (first + last)
    logits = _logits(case) if last else 0.0
    if last and case.spread and habits.keeps_gathered:
        logits += 2 * whole_rows  # the head's input, and its gradient
    buffers = _gathered(case, rank, held) + max(0.0, temporary - logits)  # the loss is over before blocks go backward
    if habits.first_step:
        update = 4 * _updated(case, rank, held)
        if moments + update > activations + logits + buffers:
            activations, logits, buffers = 0.0, 0.0, update
        else:
            moments = 0.0
    total = parameters + gradients + masters + moments + activations + logits + buffers
    own = case.hardware.rates
    fragments = FRAGMENTS * total + WORKSPACE if habits.reserved else 0.0
    fragments += (own.process.value if own.process else 0.0) + _retained(case, total, activations, held)
    return Memory(parameters, gradients, masters + moments, activations, logits, buffers, fragments)


def _retained(case: Case, total: float, activations: float, held: Held) -> float:
    """What an allocator of the host keeps: threads that send, and tensors that come and go, leave holes in its heaps."""
    sharded = case.shard == "zero3"
    whole = {"fsdp": held.dense, "efsdp": held.experts}
    of = {"all": total, "fsdp": sum(case.width * n for axis, n in whole.items() if sharded and group(case, axis).ranks > 1)}
    of |= {axis: activations for axis in ("tp", "cp", "pp") if getattr(case, axis) > 1}
    return sum(share.value * of.get(name, 0.0) for name, share in case.hardware.rates.retained.items())


def _state(case: Case, held: Held) -> tuple[float, float, float, float]:
    """Bytes of parameters, gradients, masters beside the parameters, and moments, as ranks share them."""
    habits, whole = case.habits, case.shard != "zero3"
    owned = held.all if case.shard == "none" else _shards(case, held)
    here = 3 / 16 if "optimizer" in case.offload else 1.0  # of what waits on the host
    master = case.parameter_bytes - (habits.weight_bytes if habits.reuses_master else 0)
    parameters = habits.weight_bytes * (held.all if whole else owned) or master * owned
    masters = master * owned * here if habits.weight_bytes else 0.0
    moments = 2 * (habits.moment_bytes or case.parameter_bytes) * owned * here
    later = (case.pp > 1 or habits.reduces_once) and case.micros > 1  # gradients are shared after the last micro-batch alone
    spread = case.shard in ("zero2", "zero3") and not later
    gradients = (habits.gradient_bytes + habits.second_gradient) * (owned if spread else held.all)
    return parameters, gradients, masters, moments


def _shards(case: Case, held: Held) -> float:
    return held.dense / group(case, "fsdp").ranks + held.experts / group(case, "efsdp").ranks


def _updated(case: Case, rank: int, held: Held) -> float:
    """Elements of the largest piece of a parameter that a rank updates, of which the update makes a copy in fp32."""
    dense, experts = largest_tensors(case, rank)
    if case.shard == "none":
        return max(dense, experts)
    return max(min(dense, held.dense / group(case, "fsdp").ranks), min(experts, held.experts / group(case, "efsdp").ranks))


def _gathered(case: Case, rank: int, held: Held) -> float:
    """FSDP's whole parameters in the format of the products: two blocks at a time, or all of a stage that stays gathered. On one rank it
    casts them all once a step."""
    e = case.width
    if case.shard != "zero3":
        return e * held.all if case.habits.weight_bytes == 0 and e < case.parameter_bytes else 0.0
    if group(case, "fsdp").ranks == 1:
        return 0.0
    if case.pp > 1 or not case.reshard:
        return e * held.all
    block = block_held(case, dense=case.model.ffn.kind != "moe").all
    table = case.model.vocab_size * case.model.hidden / case.tp
    return e * (block + max(block, table)) + 4 * max(block, table)  # the second: gradients on their way in fp32


def _temporary(case: Case) -> float:
    """Gradients of the widest activations, in a backward pass."""
    return 2 * 2 * case.rows * max(_inside(case), case.model.hidden)


def _inside(case: Case) -> float:
    """Numbers per token of the feed-forward branch's hidden layer on a rank, gate and up."""
    ffn = case.model.ffn
    gates = 2 if ffn.activation == "swiglu" else 1
    if ffn.kind == "moe":
        return gates * ffn.hidden * ffn.top_k / case.tp
    return gates * ffn.hidden / case.tp


def _logits(case: Case) -> float:
    """In 16 bits, in fp32 and as gradients; of a few tokens where the loss goes through them in pieces."""
    rows = min(case.rows, 1024) if case.habits.chunked_loss else case.rows
    return rows * case.model.vocab_size / case.tp * case.habits.logit_bytes


def in_flight(case: Case) -> tuple[float, ...]:
    """Per rank along pp, the most (stage, micro-batch) whose activations exist at once."""
    if case.pp == 1:
        return (1.0,)
    p, v, n, kind = case.pp, case.virtual, case.micros, case.kind
    if kind == "1f1b":
        return tuple(float(min(n, p - rank)) for rank in range(p))
    if kind == "gpipe":
        return tuple(float(n * v) for _ in range(p))
    if kind == "interleaved" and n >= p:
        group_size = n // max(1, n // p) + (n % max(1, n // p) > 0)
        return tuple(float(min(n * v, (v - 1) * group_size + 2 * (p - 1 - rank) + 1 + case.overlap_micro_batches)) for rank in range(p))
    schedule = build(kind, ranks=p, virtual_stages=v, micro_batches=min(n, 4 * p), pairs=case.overlap_micro_batches)
    return tuple(map(float, peak_activations(schedule)))


def _mean_chunk(case: Case, rank: int, blocks: tuple[float, float]) -> float:
    """What one micro-batch leaves at one stage of the rank, on average over its stages; `blocks` are bytes of a dense one and a mixture."""
    own, total = stages_of(case, rank), 0.0
    for stage in own:
        dense, mixtures = blocks_of(case, stage)
        total += dense * blocks[0] + mixtures * blocks[1]
        if stage == case.stages - 1:
            total += case.model.mtp.heads * blocks[case.model.ffn.kind == "moe"]
    return total / len(own)


def _recomputed(case: Case) -> float:
    """A block whose inside is there again in its backward pass."""
    if not case.recompute & {"full", "selective", "half_products"}:
        return 0.0
    plain = case.with_(recompute=frozenset())
    return kept(plain, dense=case.model.ffn.kind != "moe")
