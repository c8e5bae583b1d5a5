"""What BigMac's paper compares, in its closed form (arXiv 2502.16927): parameters, FLOPs and all-to-all bytes of a GPT with experts.

L layers of width D, E experts of two matrices [W,F] and [F,W], k of them per token, V entries of the vocabulary; a step of T tokens in rows
of S. Fine-grained experts have W = D and F = r D; BigMac's W = r D and F = D, between two projections of D to W that a layer's experts
share. The form leaves out what a built model has besides: docs/moe.md itemises it.
"""

from llmtrain.config.model import ModelConfig


def parameters(model: ModelConfig) -> int:
    """(4 D^2 + 8 D + E (2 r D^2 + 2 r D)) L + (V + E + 2) D, and 2 r D^2 L for BigMac's two projections; `model.vocab_size` is set."""
    ffn, hidden = model.ffn, model.hidden
    narrow = min(_width(model), ffn.hidden)
    layer = 4 * hidden**2 + 8 * hidden + ffn.experts * (2 * _width(model) * ffn.hidden + 2 * narrow) + 2 * _projected(model)
    return layer * model.layers + (model.vocab_size + ffn.experts + 2) * hidden


def flops(model: ModelConfig, *, tokens: int, seq_len: int) -> float:
    """Forward and backward, 12 T L D^2 (2 + S / D + V / (2 L D) + r k), and 12 r T L D^2 for BigMac's two projections."""
    ffn, hidden = model.ffn, model.hidden
    others = 2 * hidden**2 + seq_len * hidden + model.vocab_size * hidden / (2 * model.layers)
    return 12.0 * tokens * model.layers * (others + _width(model) * ffn.hidden * ffn.top_k + _projected(model))


def all_to_all_bytes(model: ModelConfig, *, tokens: int, ep: int) -> float:
    """What all ranks send in 16 bits: 8 T L W k (ep - 1) / ep, there and back, forward and backward."""
    return 8.0 * tokens * model.layers * _width(model) * model.ffn.top_k * (ep - 1) / ep


def _width(model: ModelConfig) -> int:
    """W of the rows that are sent."""
    return model.ffn.descend or model.hidden


def _projected(model: ModelConfig) -> int:
    """Elements of one of BigMac's two projections."""
    return model.hidden * (model.ffn.descend or 0)
