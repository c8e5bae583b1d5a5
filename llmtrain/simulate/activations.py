"""Bytes of activations that one block keeps for its backward pass.

arXiv 2205.05198, section 4, extended to gates, experts and latent attention.
"""

from llmtrain.config.model import ModelConfig
from llmtrain.simulate.case import Case


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
        rest = (1 - case.recomputed) * per_token(case.with_(recompute=frozenset()), model) if case.recomputed < 1 else 0.0
        return rest + (0.0 if "activations" in case.offload or "block_input" in case.offload else case.recomputed * stream)
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
    return heads * (e * case.value_width(model) + case.habits.statistics)


def _attention_bytes(case: Case, model: ModelConfig, e: int) -> float:
    heads, what = model.attention.heads / case.tp, case.recompute
    kv = max(1.0, model.kv_heads / case.tp)
    d, dv = model.head_dim, case.value_width(model)
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
    if {"moe", "experts"} & what:
        return router
    rows = ffn.top_k * once * case.etp
    sent = 0.0 if "permute" in what else 2 * e * width * rows
    returned = 0.0 if "expert_output" in case.offload else e * width * rows
    inside = e * (gates - bool(again)) * ffn.hidden / case.etp * rows
    return router + shared + sent + returned + inside
