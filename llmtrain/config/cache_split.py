"""Which layers keep their keys and values on the device in generation, and which on the host. In closed form, without torch.

FastAttention's split (arXiv 2410.16663), N ranks sharing every layer, M bytes on each device, B sequences of S tokens:

    L_device = floor((M - W / N - M_vocab - M_act) / (B S (K / N) (d + dv) bytes)),    L_host = L - L_device

with W / N the blocks' weights, M_vocab those of embedding and head, M_act what the pass over a prompt holds at once.
"""

from typing import NamedTuple

from llmtrain.config.memory import block_held
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters


class Answering(NamedTuple):
    """How a model is asked: the sequences, and the ranks that share it."""

    rows: int
    """Sequences B at once."""
    tokens: int
    """Tokens S of each, new ones included."""
    ranks: int = 1
    """N, the ranks of tp, which share experts too."""
    itemsize: int = 2
    """Bytes of a number."""
    chunks: int = 1
    """Tiles of a prompt (--tp-chunks)."""


class CacheSplit(NamedTuple):
    """What lies where. Bytes are those of one device, or of the host for all ranks together."""

    parts: dict[str, float]
    """On a device beside the cache: `weights of blocks`, `embedding and head`, `a prompt's pass`."""
    layer: float
    """Keys and values of one layer on one device."""
    device_layers: int
    host_layers: int
    host: float
    """Keys and values on the host."""

    @property
    def device(self) -> float:
        """All of it on one device."""
        return sum(self.parts.values()) + self.device_layers * self.layer


def cache_split(model: ModelConfig, asked: Answering, *, memory: float) -> CacheSplit | None:
    """The split on devices of `memory` bytes; None if a device cannot hold even the model and a prompt's pass."""
    parts, layer = fixed_parts(model, asked), layer_bytes(model, asked)
    free = memory - sum(parts.values())
    if free < 0:
        return None
    here = min(model.layers, int(free // layer))
    away = model.layers - here
    return CacheSplit(parts, layer, here, away, away * layer * asked.ranks)


def layer_bytes(model: ModelConfig, asked: Answering) -> float:
    """Keys and values of one layer on one rank, which has at least one key/value head."""
    heads = max(1.0, model.kv_heads / asked.ranks)
    return asked.rows * asked.tokens * heads * (model.head_dim + model.value_head_dim) * asked.itemsize


def fixed_parts(model: ModelConfig, asked: Answering) -> dict[str, float]:
    """Bytes on one device beside the cache."""
    counts, ranks = count_parameters(model), asked.ranks
    blocks = sum(block_held(model.of_block(i), tp=ranks, shares=ranks) for i in range(model.layers))
    return {
        "weights of blocks": (blocks + counts["norms"]) * asked.itemsize,
        "embedding and head": (counts["embedding"] + counts["head"]) / ranks * asked.itemsize,
        "a prompt's pass": asked.rows * asked.tokens * pass_width(model, asked) * asked.itemsize,
    }


def pass_width(model: ModelConfig, asked: Answering) -> float:
    """Numbers per token that the pass over a prompt holds at once: positions and RoPE's tables, and the most of two moments.

    Before attention: the residual stream, what the norm gives, and queries and keys twice, as RoPE copies them. In the feed-forward branch:
    the residual stream before and after attention, attention's branch and result, the norm's, the branch's, and of one tile gate, up, the
    gate's SiLU and the product; of a mixture of experts these for all experts of a token, whose rows go in and come out besides.
    """
    ranks, ffn = asked.ranks, model.ffn
    heads, kv_heads = model.attention.heads / ranks, max(1.0, model.kv_heads / ranks)
    value, inside = model.value_head_dim, 4 if ffn.activation == "swiglu" else 2
    before = 2 * model.hidden + 2 * (heads + kv_heads) * model.head_dim + kv_heads * value
    if ffn.kind == "moe":
        branch = ffn.top_k * (2 * (ffn.descend or model.hidden) + inside * ffn.hidden / ranks)
    else:
        branch = inside * ffn.hidden / ranks / asked.chunks
    return max(before, 5 * model.hidden + heads * value + branch) + 2 * model.rope_dim + 8 / asked.itemsize


def longest(model: ModelConfig, asked: Answering, *, memory: float, host: float) -> int:
    """The most tokens of a sequence of which everything has a place, with `host` bytes of the host's memory for keys and values."""
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        split = cache_split(model, asked._replace(tokens=middle), memory=memory)
        low, high = (middle, high) if split is not None and split.host <= host else (low, middle)
    return low
