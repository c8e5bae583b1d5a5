"""Which part of each parameter a rank holds, and which parameters are gathered together, as arithmetic.

The same numbers as `parallel/apply.py` gives by building the model; tests and the dry mesh compare the two. They describe the built-in
transformer.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.layout.mesh import EXPERT_AXES, MeshShape
from llmtrain.layout.pipeline import PipelinePlan


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


class Unit(NamedTuple):
    """Parameters that FSDP gathers in one collective. `kind`: block, experts, embedding, head, rest."""

    kind: str
    weights: tuple[Weight, ...]
    stays: bool = False
    """Whether it stays gathered between forward and backward whatever parallel.reshard_after_forward says."""


class Held(NamedTuple):
    """What one rank holds of a parameter."""

    name: str
    elements: int
    partial: bool
    """Whether its gradient has to be summed over tp."""
    copy: bool
    """Whether it is the last stage's second token embedding, which another stage holds too."""


class Shards:
    """The parameters of global rank `rank`, stage by stage."""

    def __init__(self, cfg: RunConfig, shape: MeshShape, *, rank: int):
        self.cfg, self.shape, self.model = cfg, shape, cfg.model
        self.place, self.expert_place = shape.place(rank), shape.place(rank, EXPERT_AXES)
        self.plan = PipelinePlan.from_config(cfg) if shape.pp > 1 else None
        self.shared_experts = shape.ep > 1 or shape.etp > 1
        self.sharded = shape.shares_parameters

    def stages(self) -> list[int]:
        """Numbers of the stages that the rank holds; 0 without a pipeline."""
        return [0] if self.plan is None else self.plan.stages_of(self.place["pp"])

    def first(self, stage: int) -> bool:
        """Whether `stage` embeds the tokens."""
        return stage == 0

    def last(self, stage: int) -> bool:
        """Whether `stage` has the head."""
        return self.plan is None or stage == self.plan.stages - 1

    def blocks(self, stage: int) -> range:
        """Numbers of its blocks, those of multi-token prediction not included."""
        return range(self.model.layers) if self.plan is None else self.plan.blocks(stage)

    def held(self) -> list[Held]:
        """Every parameter of the rank."""
        found = []
        for stage in self.stages():
            for unit in self.units(stage):
                ranks, index = self.sharding(unit)
                for weight in unit.weights:
                    copy = weight.name == "embedding.weight" and not self.first(stage)
                    partial = self.shape.tp > 1 and not weight.split
                    found.append(Held(weight.name, weight.held(ranks, index), partial, copy))
        return found

    def sharding(self, unit: Unit) -> tuple[int, int]:
        """Ranks that FSDP shards the unit over, and this rank's place among them."""
        if not self.sharded:
            return 1, 0
        if unit.kind == "experts":
            return self.shape.efsdp, self.expert_place["efsdp"]
        return self.shape.fsdp, self.place["dp_shard"] * self.shape.cp + self.place["cp"]

    def units(self, stage: int) -> list[Unit]:
        """What FSDP gathers in one collective each."""
        heads = range(self.model.mtp.heads if self.last(stage) else 0)
        names = [f"blocks.{i}." for i in self.blocks(stage)] + [f"mtp.{i}.block." for i in heads]
        found = [unit for name in names for unit in self._block(name, stays=name == names[-1])]
        found += self._ends(stage)
        rest = tuple(self._rest(stage))
        return found + ([Unit("rest", rest, stays=True)] if rest else [])

    def _ends(self, stage: int) -> Iterator[Unit]:
        """Embedding, and head, with the norm before it unless others use that too, where they are not one."""
        if self._one_table(stage):
            return
        if self._embeds(stage):
            yield Unit("embedding", (self._table("embedding.weight"),))
        if self.last(stage):
            norm = () if self.model.mtp.heads else tuple(_norm(self.model, "final_norm."))
            yield Unit("head", (*norm, self._table("head.weight")), stays=True)

    def _one_table(self, stage: int) -> bool:
        return self.model.tie_embeddings and self.last(stage)

    def _embeds(self, stage: int) -> bool:
        return self.first(stage) or (self.last(stage) and self.model.mtp.heads > 0)

    def _table(self, name: str) -> Weight:
        rows = -(-self.model.vocab_size // self.shape.tp)
        mine = max(0, min(rows, self.model.vocab_size - self.place["tp"] * rows))
        return Weight((mine, self.model.hidden), name, split=True)

    def _rest(self, stage: int) -> Iterator[Weight]:
        model = self.model
        if self._one_table(stage):
            yield self._table("embedding.weight")
        if self.first(stage) and model.position.kind == "learned":
            yield Weight((model.max_seq_len, model.hidden), "position_embedding.weight")
        if self.last(stage):
            if self._one_table(stage) or model.mtp.heads:
                yield from _norm(model, "final_norm.")
            for i in range(model.mtp.heads):
                yield from _norm(model, f"mtp.{i}.hidden_norm.")
                yield from _norm(model, f"mtp.{i}.embedding_norm.")
                yield Weight((model.hidden, 2 * model.hidden), f"mtp.{i}.proj.weight")

    def _block(self, name: str, *, stays: bool) -> list[Unit]:
        moe = self.model.ffn.kind == "moe"
        experts = tuple(self._experts(name + "ffn.experts.")) if moe else ()
        weights = [*self._attention(name), *(self._router(name) if moe else self._dense(name + "ffn."))]
        if moe and self.shared_experts:
            return [Unit("experts", experts, stays), Unit("block", tuple(weights), stays)]
        return [Unit("block", (*weights, *experts), stays)]

    def _attention(self, name: str) -> Iterator[Weight]:
        model, a, d, tp = self.model, self.model.attention, self.model.head_dim, self.shape.tp
        norms = ["attention_norm.", "ffn_norm."]
        norms += [] if model.norm.placement == "pre" else ["post_attention_norm.", "post_ffn_norm."]
        for norm in norms:
            yield from _norm(model, name + norm)
        split_kv = model.kv_heads >= tp
        for proj, heads, split in (("q", a.heads, True), ("k", model.kv_heads, split_kv), ("v", model.kv_heads, split_kv)):
            rows = heads * d // (tp if split else 1)
            yield Weight((rows, model.hidden), f"{name}attention.{proj}_proj.weight", split)
            if a.qkv_bias:
                yield Weight((rows,), f"{name}attention.{proj}_proj.bias", split)
        yield Weight((model.hidden, a.heads * d // tp), f"{name}attention.out_proj.weight", True)
        if a.out_bias:
            yield Weight((model.hidden,), f"{name}attention.out_proj.bias")
        if a.qk_norm:
            yield from (Weight((d,), f"{name}attention.{x}_norm.weight") for x in "qk")

    def _dense(self, name: str) -> Iterator[Weight]:
        ffn, hidden, width = self.model.ffn, self.model.hidden, self.model.ffn.hidden // self.shape.tp
        for proj in ("gate_proj", "up_proj") if ffn.activation == "swiglu" else ("up_proj",):
            yield Weight((width, hidden), f"{name}{proj}.weight", True)
            if ffn.bias:
                yield Weight((width,), f"{name}{proj}.bias", True)
        yield Weight((hidden, width), f"{name}down_proj.weight", True)
        if ffn.bias:
            yield Weight((hidden,), f"{name}down_proj.bias")

    def _router(self, name: str) -> Iterator[Weight]:
        yield Weight((self.model.ffn.experts, self.model.hidden), f"{name}ffn.router.weight")

    def _experts(self, name: str) -> Iterator[Weight]:
        ffn, hidden = self.model.ffn, self.model.hidden
        count, width = ffn.experts // self.shape.ep, ffn.hidden // self.shape.etp
        for proj in ("gate_proj", "up_proj") if ffn.activation == "swiglu" else ("up_proj",):
            yield Weight((count, hidden, width), name + proj, self.shared_experts)
        yield Weight((count, width, hidden), name + "down_proj", self.shared_experts)


def _norm(model: ModelConfig, name: str) -> Iterator[Weight]:
    yield Weight((model.hidden,), name + "weight")
    if model.norm.kind == "layer_norm":
        yield Weight((model.hidden,), name + "bias")
