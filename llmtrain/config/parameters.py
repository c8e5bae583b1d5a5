"""What a model costs, in closed form: parameters by part, FLOPs per token. Needs no torch."""

from llmtrain.config.errors import ConfigError
from llmtrain.config.model import ModelConfig

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Exact number of parameters by part.

    Returns:
        `embedding` (tokens and learned positions), `attention`, `ffn` (routers and all experts), `norms`, `head` (0 if tied), `mtp` (what
        the heads of multi-token prediction add), `total`, `without embeddings` (total less embedding and head), and `active`: total less
        the experts that a token does not go to.

    Raises:
        ConfigError: model.vocab_size is not set.
    """
    table = _table(model)
    positions = model.max_seq_len * model.hidden if model.position.kind == "learned" else 0
    parts = {
        "embedding": table + positions,
        "attention": model.layers * attention_parameters(model),
        "ffn": _dense_layers(model) * ffn_parameters(model.of_block(0)) + (model.layers - _dense_layers(model)) * ffn_parameters(model),
        "norms": norm_parameters(model),
        "head": 0 if model.tie_embeddings else table,
        "mtp": model.mtp.heads * mtp_parameters(model),
    }
    total = sum(parts.values())
    idle = (model.expert_layers + model.mtp.heads) * (ffn_parameters(model) - active_ffn_parameters(model))
    return parts | {"total": total, "without embeddings": total - parts["embedding"] - parts["head"], "active": total - idle}


def worth_saying(counts: dict[str, int]) -> dict[str, int]:
    """`count_parameters` without the lines that say nothing: no multi-token prediction, and active parameters where all are."""
    idle = {"mtp": 0, "active": counts["total"]}
    return {part: count for part, count in counts.items() if idle.get(part) != count}


def _table(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size: null has no parameter count; give it, or tokenizer.path so that it is read from the tokenizer")
    return model.vocab_size * model.hidden


def attention_parameters(model: ModelConfig) -> int:
    """Of one block: query, key, value and output projections, and the norms over the head dim or the narrow vectors."""
    if model.attention.kind == "mla":
        return sum(_latent_matrices(model)) + (model.attention.query_rank or 0) + model.attention.kv_rank
    a, width = model.attention, model.head_dim * (model.attention.heads + 2 * model.kv_heads)
    out = model.head_dim * a.heads
    biases = width * a.qkv_bias + model.hidden * a.out_bias
    return model.hidden * (width + out) + biases + 2 * model.head_dim * a.qk_norm


def _latent_matrices(model: ModelConfig) -> list[int]:
    """Elements of the matrices of one block's multi-head latent attention."""
    a, d = model.attention, model.hidden
    queries = [(a.query_rank or d) * a.heads * model.head_dim, d * (a.query_rank or 0)]
    return [*queries, d * (a.kv_rank + a.rope_dim), a.kv_rank * a.heads * (a.nope_dim + a.value_dim), a.heads * a.value_dim * d]


def _dense_layers(model: ModelConfig) -> int:
    """Blocks before those with experts."""
    return model.layers - model.expert_layers if model.ffn.kind == "moe" else 0


def ffn_parameters(model: ModelConfig) -> int:
    """Of one block: two projections, three with a gate; of a mixture of experts as many for each of them, and what they share: the router,
    shared experts, BigMac's two projections."""
    ffn = model.ffn
    if ffn.kind == "moe":
        shared = _network(model, model.hidden, ffn.shared_hidden) if ffn.shared_experts else 0
        return ffn.experts * (model.hidden + expert_parameters(model)) + shared + 2 * model.hidden * (ffn.descend or 0)
    return _network(model, model.hidden, ffn.hidden)


def _network(model: ModelConfig, outside: int, inside: int) -> int:
    """Of a feed-forward network, with its biases."""
    biases = ((_projections(model) - 1) * inside + outside) * model.ffn.bias
    return _projections(model) * outside * inside + biases


def active_ffn_parameters(model: ModelConfig) -> int:
    """Of one block, those that take part in the computation of one token."""
    idle = (model.ffn.experts - model.ffn.top_k) * expert_parameters(model) if model.ffn.kind == "moe" else 0
    return ffn_parameters(model) - idle


def expert_parameters(model: ModelConfig) -> int:
    """Of one expert."""
    return _network(model, model.ffn.descend or model.hidden, model.ffn.hidden)


def _projections(model: ModelConfig) -> int:
    return 3 if model.ffn.activation == "swiglu" else 2


def norm_parameters(model: ModelConfig) -> int:
    """Of the whole model without heads of multi-token prediction: those of the blocks, and the final one."""
    return model.layers * _block_norms(model) + _norm_width(model)


def _block_norms(model: ModelConfig) -> int:
    """Two norms per block, four in a sandwich."""
    return (2 if model.norm.placement == "pre" else 4) * _norm_width(model)


def _norm_width(model: ModelConfig) -> int:
    """LayerNorm has a bias besides."""
    return (2 if model.norm.kind == "layer_norm" else 1) * model.hidden


def mtp_parameters(model: ModelConfig) -> int:
    """Of one head of multi-token prediction: two norms, the projection [2D -> D] and a block; embedding, final norm and head are shared."""
    block = attention_parameters(model) + ffn_parameters(model) + _block_norms(model)
    return 2 * _norm_width(model) + 2 * model.hidden**2 + block


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = True, adapters: int = 0) -> float:
    """FLOPs of forward and backward pass per token, for MFU: 6 per matmul parameter, the head included, plus attention.

    Of a mixture of experts, those that a token goes to count. A head of multi-token prediction adds a projection, a block and another
    pass of the output head.

    Args:
        model: the model.
        seq_len: tokens per sequence, all in one document.
        causal: True counts the keys that a token may see, (S + 1) / 2 on average, fewer with a window. False counts all S of them
            whatever the mask, the convention of PaLM (arXiv 2204.02311, appendix B: 6 N + 12 L H Q T) and of Megatron-LM, which
            gives a higher MFU for the same speed. Recomputed activations count in neither.
        adapters: parameters of adapters that are trained in the place of the weights, if any. Each counts 6, a frozen weight 4: it has no
            gradient.
    """
    head, extra = _table(model), model.mtp.heads
    weights = matmul_parameters(model) + (1 + extra) * head + extra * 2 * model.hidden**2
    keys = mean_keys(model, seq_len) if causal else seq_len
    passes = 4.0 * weights + 6.0 * adapters if adapters else 6.0 * weights
    return passes + 6.0 * (model.layers + extra) * model.attention.heads * (model.head_dim + model.value_head_dim) * keys


def matmul_parameters(model: ModelConfig) -> int:
    """Weights of all blocks, those of multi-token prediction included, that multiply one token's activations: no biases, norms, tables."""
    blocks = [(model, model.layers + model.mtp.heads - _dense_layers(model)), (model.of_block(0), _dense_layers(model))]
    return sum(count * block_matmul_parameters(block) for block, count in blocks)


def block_matmul_parameters(model: ModelConfig) -> int:
    """Weights of one block that multiply one token's activations; of `model.of_block(i)` those of block i."""
    a, ffn = model.attention, model.ffn
    heads = model.head_dim * (2 * a.heads + 2 * model.kv_heads)
    attention = sum(_latent_matrices(model)) if a.kind == "mla" else model.hidden * heads
    if ffn.kind == "dense":
        return attention + _projections(model) * model.hidden * ffn.hidden
    width = ffn.descend or model.hidden
    experts = _projections(model) * ffn.hidden * (ffn.top_k * width + ffn.shared_experts * model.hidden)
    return attention + experts + model.hidden * (ffn.experts + 2 * (ffn.descend or 0))


def mean_keys(model: ModelConfig, seq_len: int) -> float:
    """Keys that a token attends to, averaged over a causal sequence."""
    window = min(model.attention.window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def loss_rows(vocab_size: int, loss_chunk: int | None) -> int:
    """train.loss_chunk; where it is not given a power of two, as few rows hold little memory and many keep the products efficient.

    Logits below 32 MiB in fp32 are memory that the C library keeps for the next chunk; above, the kernel clears new pages for each.
    """
    if loss_chunk is not None:
        return loss_chunk
    fitting = (2**25 - 1) // (4 * vocab_size)
    return min(1024, max(256, 1 << max(0, fitting.bit_length() - 1)))
