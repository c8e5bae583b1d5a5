"""The parameters of one block, as tensor and expert parallelism leave them on a rank, as arithmetic."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from llmtrain.config.model import ModelConfig
from llmtrain.layout.mesh import MeshShape


class Weight(NamedTuple):
    """A parameter as tensor and expert parallelism leave it on one rank, before FSDP shards its first dim."""

    shape: tuple[int, ...]
    name: str = ""
    split: bool = False
    """Whether ranks of tp hold different parts; else each has a partial sum of its gradient."""

    def padded(self, ranks: int) -> int:
        """Elements of one shard as it travels: FSDP2 pads the first dim to a multiple of `ranks`."""
        return -(-self.shape[0] // ranks) * prod(self.shape[1:])

    def held(self, ranks: int, index: int) -> int:
        """Elements of shard `index` of `ranks`, without padding."""
        rows = -(-self.shape[0] // ranks)
        return max(0, min(rows, self.shape[0] - index * rows)) * prod(self.shape[1:])


def norm(model: ModelConfig, name: str) -> Iterator[Weight]:
    """Of one norm over the model's width."""
    yield Weight((model.hidden,), name + "weight")
    if model.norm.kind == "layer_norm":
        yield Weight((model.hidden,), name + "bias")


def beside_experts(model: ModelConfig, shape: MeshShape, name: str) -> Iterator[Weight]:
    """Of the block `name` all but its experts; `model` is the configuration as that block has it (`ModelConfig.of_block`)."""
    norms = ["attention_norm.", "ffn_norm."]
    norms += [] if model.norm.placement == "pre" else ["post_attention_norm.", "post_ffn_norm."]
    for one in norms:
        yield from norm(model, name + one)
    attention = _latent_attention if model.attention.kind == "mla" else _attention
    yield from attention(model, name + "attention.", shape.tp)
    if model.ffn.kind == "moe":
        yield from _around_experts(model, name + "ffn.")
    else:
        yield from _dense(model, name + "ffn.", width=model.ffn.hidden, tp=shape.tp)


def experts(model: ModelConfig, shape: MeshShape, name: str) -> Iterator[Weight]:
    """Of the experts of the block `name` that a rank holds."""
    ffn, shared = model.ffn, shape.ep > 1 or shape.etp > 1
    outside, count, inside = ffn.descend or model.hidden, ffn.experts // shape.ep, ffn.hidden // shape.etp
    for proj in ("gate", "up") if ffn.activation == "swiglu" else ("up",):
        yield Weight((count, outside, inside), f"{name}ffn.experts.{proj}_proj", shared)
        if ffn.bias:
            yield Weight((count, inside), f"{name}ffn.experts.{proj}_bias", shared)
    yield Weight((count, inside, outside), f"{name}ffn.experts.down_proj", shared)
    if ffn.bias:
        yield Weight((count, outside), f"{name}ffn.experts.down_bias", shared)


def _attention(model: ModelConfig, name: str, tp: int) -> Iterator[Weight]:
    a, d = model.attention, model.head_dim
    split_kv = model.kv_heads >= tp
    for proj, heads, split in (("q", a.heads, True), ("k", model.kv_heads, split_kv), ("v", model.kv_heads, split_kv)):
        rows = heads * d // (tp if split else 1)
        yield Weight((rows, model.hidden), f"{name}{proj}_proj.weight", split)
        if a.qkv_bias:
            yield Weight((rows,), f"{name}{proj}_proj.bias", split)
    yield Weight((model.hidden, a.heads * d // tp), f"{name}out_proj.weight", True)
    if a.out_bias:
        yield Weight((model.hidden,), f"{name}out_proj.bias")
    if a.qk_norm:
        yield from (Weight((d,), f"{name}{x}_norm.weight") for x in "qk")


def _latent_attention(model: ModelConfig, name: str, tp: int) -> Iterator[Weight]:
    """What makes the narrow vectors is whole on every rank of tp, what makes heads of them split."""
    a, heads = model.attention, model.attention.heads // tp
    if a.query_rank is not None:
        yield Weight((a.query_rank, model.hidden), name + "q_down_proj.weight")
        yield Weight((a.query_rank,), name + "q_norm.weight")
    yield Weight((heads * model.head_dim, a.query_rank or model.hidden), name + "q_up_proj.weight", True)
    yield Weight((a.kv_rank + a.rope_dim, model.hidden), name + "kv_down_proj.weight")
    yield Weight((a.kv_rank,), name + "kv_norm.weight")
    yield Weight((heads * (a.nope_dim + a.value_dim), a.kv_rank), name + "kv_up_proj.weight", True)
    yield Weight((model.hidden, heads * a.value_dim), name + "out_proj.weight", True)


def _dense(model: ModelConfig, name: str, *, width: int, tp: int) -> Iterator[Weight]:
    """A dense network of so many numbers inside, which `tp` ranks share."""
    ffn, hidden, split = model.ffn, model.hidden, tp > 1
    for proj in ("gate_proj", "up_proj") if ffn.activation == "swiglu" else ("up_proj",):
        yield Weight((width // tp, hidden), f"{name}{proj}.weight", split)
        if ffn.bias:
            yield Weight((width // tp,), f"{name}{proj}.bias", split)
    yield Weight((hidden, width // tp), f"{name}down_proj.weight", split)
    if ffn.bias:
        yield Weight((hidden,), f"{name}down_proj.bias")


def _around_experts(model: ModelConfig, name: str) -> Iterator[Weight]:
    """Router, BigMac's two projections and shared experts, whole on every rank of tp. A router's bias is a buffer and no parameter."""
    ffn, hidden = model.ffn, model.hidden
    yield Weight((ffn.experts, hidden), name + "router.weight")
    if ffn.descend:
        yield Weight((ffn.descend, hidden), name + "descend_proj.weight")
        yield Weight((hidden, ffn.descend), name + "ascend_proj.weight")
    if ffn.shared_experts:
        yield from _dense(model, name + "shared.", width=ffn.shared_hidden, tp=1)
