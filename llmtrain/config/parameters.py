"""What a model costs, in closed form: parameters by part, FLOPs per token, bytes per rank. Needs no torch."""

from llmtrain.config.errors import ConfigError
from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Exact number of parameters by part.

    Returns:
        `embedding` (tokens and learned positions), `attention`, `ffn`, `norms`, `head` (0 if tied), `total`, and `without embeddings`
        (total less embedding and head).

    Raises:
        ConfigError: model.vocab_size is not set.
    """
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size: null has no parameter count; give it, or tokenizer.path so that it is read from the tokenizer")
    table = model.vocab_size * model.hidden
    positions = model.max_seq_len * model.hidden if model.position.kind == "learned" else 0
    parts = {
        "embedding": table + positions,
        "attention": model.layers * attention_parameters(model),
        "ffn": model.layers * ffn_parameters(model),
        "norms": norm_parameters(model),
        "head": 0 if model.tie_embeddings else table,
    }
    total = sum(parts.values())
    return parts | {"total": total, "without embeddings": total - parts["embedding"] - parts["head"]}


def attention_parameters(model: ModelConfig) -> int:
    """Of one block: query, key, value and output projections, and the norms over the head dim."""
    a, width = model.attention, model.head_dim * (model.attention.heads + 2 * model.kv_heads)
    out = model.head_dim * a.heads
    biases = width * a.qkv_bias + model.hidden * a.out_bias
    return model.hidden * (width + out) + biases + 2 * model.head_dim * a.qk_norm


def ffn_parameters(model: ModelConfig) -> int:
    """Of one block: two projections, three with a gate."""
    gates = 2 if model.ffn.activation == "swiglu" else 1
    biases = (gates * model.ffn.hidden + model.hidden) * model.ffn.bias
    return (gates + 1) * model.hidden * model.ffn.hidden + biases


def norm_parameters(model: ModelConfig) -> int:
    """Of the whole model: two per block, four in a sandwich, and the final one; LayerNorm has a bias besides."""
    per_block = 2 if model.norm.placement == "pre" else 4
    vectors = 2 if model.norm.kind == "layer_norm" else 1
    return (per_block * model.layers + 1) * vectors * model.hidden


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of forward and backward pass per token, for MFU: 6 per matmul parameter, the head included, plus attention.

    Args:
        model: the model.
        seq_len: tokens per sequence, all in one document.
        causal: True counts the keys that a token may see, (S + 1) / 2 on average, fewer with a window. False counts all S of them
            whatever the mask, the convention of PaLM (arXiv 2204.02311, appendix B: 6 N + 12 L H Q T) and of Megatron-LM, which
            gives a higher MFU for the same speed. Recomputed activations count in neither.
    """
    head = count_parameters(model)["head"] or model.vocab_size * model.hidden
    weights = matmul_parameters(model) + head
    keys = mean_keys(model, seq_len) if causal else seq_len
    return 6.0 * weights + 12.0 * model.layers * model.attention.heads * model.head_dim * keys


def matmul_parameters(model: ModelConfig) -> int:
    """Weights of all blocks that multiply activations: no biases, no norms, no embedding, no head."""
    a = model.attention
    heads = model.head_dim * (2 * a.heads + 2 * model.kv_heads)
    gates = 3 if model.ffn.activation == "swiglu" else 2
    return model.layers * model.hidden * (heads + gates * model.ffn.hidden)


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


def memory_estimate(run: RunConfig, world: int) -> dict[str, float]:
    """Bytes on one rank by part, in closed form; a lower bound, as the activations inside a block depend on kernels and recomputation.

    Args:
        run: the run; parameters, gradients and moments are divided over dp_shard x tp x pp.
        world: number of ranks, from which dp_shard -1 follows.
    """
    p, model, train = run.parallel, run.model, run.train
    shard = p.dp_shard if p.dp_shard != -1 else max(1, world // (p.pp * p.dp_replicate * p.cp * p.tp))
    counts, split = count_parameters(model), shard * p.tp * p.pp
    largest = max(attention_parameters(model) + ffn_parameters(model), counts["head"] or counts["embedding"])
    compute, seq_len = BYTES[run.precision.compute], max([x.seq_len or train.seq_len for x in train.phases] or [train.seq_len])
    parts = {
        "parameters": counts["total"] * BYTES[run.precision.params] / split,
        "gradients": counts["total"] * BYTES[run.precision.accumulate] / split,
        "optimizer moments": 2 * counts["total"] * BYTES[run.precision.optimizer] / split,
        "gathered layers": 2 * largest * compute / p.tp if shard > 1 else 0.0,
        "logits of one chunk": 2 * loss_rows(model.vocab_size, train.loss_chunk) * model.vocab_size * 4 / p.tp,
        "block inputs": model.layers / p.pp * train.micro_batch * seq_len / p.cp * model.hidden * compute,
    }
    return parts | {"total without activations inside blocks": sum(parts.values())}
