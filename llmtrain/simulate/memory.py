"""Bytes that the ranks of each pipeline stage hold at their peak: parameters, gradients, optimizer, activations, logits, buffers.

A block's activations are what its backward pass needs (arXiv 2205.05198, section 4, of which this is the extension to gates, experts and
latent attention); how many micro-batches of them exist at once follows from the schedule.
"""

from dataclasses import dataclass

from llmtrain.config.model import ModelConfig
from llmtrain.layout.schedule import build, peak_activations
from llmtrain.simulate.case import Case
from llmtrain.simulate.held import Held, block_held, blocks_of, rank_held, stages_of
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
    shards = _shards(case, held)
    optimizer_on_host = 1 / 16 * 3 if "optimizer" in case.offload else 1.0
    sharded = case.shard != "none"
    owned = shards if sharded else held.all
    whole = case.shard == "zero3"
    master = case.parameter_bytes - (habits.weight_bytes if habits.reuses_master else 0)
    parameters = habits.weight_bytes * held.all + (master * owned if habits.weight_bytes == 0 else 0)
    optimizer = (2 * case.parameter_bytes * owned) * optimizer_on_host
    optimizer += (master * owned * optimizer_on_host) if habits.weight_bytes else 0
    spread_gradients = sharded and (whole or case.shard == "zero2") and not ((case.pp > 1 or habits.reduces_once) and case.micros > 1)
    gradients = (habits.gradient_bytes + habits.second_gradient) * (owned if spread_gradients else held.all)
    activations = count * _mean_chunk(case, rank, blocks)
    last, first = case.rank_of(case.stages - 1) == rank, case.rank_of(0) == rank
    logits = _logits(case) if last else 0.0
    activations += (case.rows * case.model.hidden * 2 / (case.tp if case.spread else 1)) * (first + last)
    gathered = _gathered(case, rank, held) if whole else 0.0
    buffers = gathered + temporary
    total = parameters + gradients + optimizer + activations + logits + buffers
    fragments = FRAGMENTS * total + WORKSPACE if habits.reserved else 0.0
    return Memory(parameters, gradients, optimizer, activations, logits, buffers, fragments)


def _shards(case: Case, held: Held) -> float:
    return held.dense / group(case, "fsdp").ranks + held.experts / group(case, "efsdp").ranks


def _gathered(case: Case, rank: int, held: Held) -> float:
    """FSDP's whole parameters in 16 bits: two blocks at a time, or all of a stage that stays gathered."""
    if group(case, "fsdp").ranks == 1:
        return 0.0
    if case.pp > 1 or not case.reshard:
        return 2 * held.all
    block = block_held(case, dense=case.model.ffn.kind != "moe").all
    table = case.model.vocab_size * case.model.hidden / case.tp
    return 2 * (block + max(block, table)) + 4 * max(block, table)  # the second: gradients on their way in fp32


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


def kept(case: Case, *, dense: bool) -> float:
    """Bytes that one block keeps of one micro-batch for its backward pass."""
    model = case.model.of_block(0) if dense else case.model
    return case.rows * per_token(case, model)


def per_token(case: Case, model: ModelConfig) -> float:
    """Bytes a token of one block."""
    e = case.width
    stream = e * model.hidden / (case.tp if case.spread else 1)
    what = case.recompute
    if "full" in what:
        return 0.0 if "activations" in case.offload or "block_input" in case.offload else stream
    norms = (2 if model.norm.placement == "pre" else 4) * stream * (2 if case.habits.copies else 1)
    inputs = 0.0 if "norms" in what or "selective" in what else 2 * (e * model.hidden if case.habits.keeps_gathered else stream)
    masks = 2 * stream / e if case.habits.dropout else 0.0
    attention = _attention_bytes(case, model, e)
    branch = _experts_bytes(case, model, e, stream) if model.ffn.kind == "moe" else _dense_bytes(case, model, e)
    if "half_products" in what:
        # Outputs of queries, keys and values, of the attention's and the network's last product, and of all but its last activation.
        gates = 3 if model.ffn.activation == "swiglu" else 2
        wide = (model.attention.heads + 2 * model.kv_heads) * model.head_dim + 2 * model.hidden
        return stream + _attention_out(case, model, e) + (e * wide / case.tp + branch * (gates - 1) / gates) / 2
    if "selective" in what:
        norms = norms / 2
    return norms + inputs + masks + attention + branch


def _attention_out(case: Case, model: ModelConfig, e: int) -> float:
    heads = model.attention.heads / case.tp
    return heads * (e * model.value_head_dim + 4)


def _attention_bytes(case: Case, model: ModelConfig, e: int) -> float:
    heads, what = model.attention.heads / case.tp, case.recompute
    kv = max(1.0, model.kv_heads / case.tp)
    d, dv = model.head_dim, model.value_head_dim
    away = "activations" in case.offload
    inputs = e * (heads * d + kv * (d + dv)) * (2 if case.habits.copies else 1)
    if model.attention.kind == "mla":
        narrow = e * 2 * ((model.attention.query_rank or 0) + model.attention.kv_rank)
        inputs = (0.0 if "mla_up" in what else inputs) + narrow
    out = _attention_out(case, model, e)
    if case.habits.flash:
        return (0.0 if away else inputs) + out
    scores = 0.0 if "attention" in what else case.seq_len * heads * (e + (1 + e if case.habits.dropout else 0))
    return inputs + heads * e * dv + scores


def _dense_bytes(case: Case, model: ModelConfig, e: int) -> float:
    inside = e * model.ffn.hidden / case.tp
    gated, copies = model.ffn.activation == "swiglu", case.habits.copies
    again = {"activation", "selective"} & case.recompute
    return inside * ((2 if gated else 1) + (0 if again else 1) + (1 if copies and gated and not again else 0))


def _experts_bytes(case: Case, model: ModelConfig, e: int, stream: float) -> float:
    ffn, what = model.ffn, case.recompute
    gates = 3 if ffn.activation == "swiglu" else 2
    once = 1 / case.tp if case.spread or case.etp == 1 else 1.0
    width, again = ffn.descend or model.hidden, {"activation", "selective"} & what
    shared = e * (gates - bool(again)) * ffn.shared_hidden / case.tp
    router = 4 * 3 * ffn.experts * once
    if "moe" in what:
        return router
    rows = ffn.top_k * once * case.etp
    sent = 0.0 if "permute" in what else 2 * e * width * rows
    returned = 0.0 if "expert_output" in case.offload else e * width * rows
    inside = e * (gates - bool(again)) * ffn.hidden / case.etp * rows
    return router + shared + sent + returned + inside
