"""The kinds of attention."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmtrain.config.base import Section


class AttentionConfig(Section):
    """Grouped-query attention; `kv_heads` equal to `heads` is multi-head, 1 is multi-query."""

    kind: Literal["gqa"] = "gqa"
    """The attention family; `mla` is multi-head latent attention."""
    heads: PositiveInt = 8
    """Query heads H."""
    kv_heads: PositiveInt | None = None
    """Key/value heads K; the number of query heads if not given."""
    head_dim: PositiveInt | None = None
    """Width of one head; hidden / heads if not given."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2, GPT)."""
    out_bias: bool = False
    """Bias on the output projection (GPT)."""
    qk_norm: bool = False
    """RMSNorm over the head dim of queries and keys before RoPE (Qwen3)."""
    window: PositiveInt | None = None
    """Sliding window: a query sees this many keys, itself included. Full causal attention if not given."""


class MLAConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come out of one narrow vector per token."""

    kind: Literal["mla"]  # no default, so that the JSON schema does not take a section without `kind` for this one
    """The attention family."""
    heads: PositiveInt = 8
    """Heads H."""
    query_rank: PositiveInt | None = None
    """Width of the vector that queries come out of; straight from the hidden state if not given."""
    kv_rank: PositiveInt = 512
    """Width of the vector that keys and values come out of."""
    nope_dim: PositiveInt = 128
    """Numbers of a head's queries and keys without position."""
    rope_dim: PositiveInt = 64
    """Numbers of a head's queries and keys that RoPE rotates; those of the key are shared by all heads."""
    value_dim: PositiveInt = 128
    """Width of one head's values."""
    softmax_scale: PositiveFloat | None = None
    """What scores are multiplied by; 1 / sqrt(nope_dim + rope_dim) if not given."""
    norm_eps: PositiveFloat | None = None
    """Added to the variance in the norms of the narrow vectors; norm.eps if not given (DeepSeek-V3: 1e-6 whatever norm.eps is)."""
    window: PositiveInt | None = None
    """Sliding window, as in gqa."""


AttentionKinds = Annotated[AttentionConfig | MLAConfig, Field(discriminator="kind")]
