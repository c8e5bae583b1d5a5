"""Which part of each parameter a rank holds, and which parameters are gathered together, as arithmetic.

The same numbers as `parallel/apply.py` gives by building the model; tests and the dry mesh compare the two. They describe the built-in
transformer.
"""

from collections.abc import Iterator
from typing import NamedTuple

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.layout.mesh import EXPERT_AXES, MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.weights import Weight, beside_experts, experts, norm


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
        self.experts_apart = shape.ep > 1 or shape.etp > 1
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
        blocks = {f"blocks.{i}.": self.model.of_block(i) for i in self.blocks(stage)}
        blocks |= {f"mtp.{i}.block.": self.model for i in heads}
        last = next(reversed(blocks), None)
        found = [unit for name, model in blocks.items() for unit in self._block(model, name, stays=name == last)]
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
            before = () if self.model.mtp.heads else tuple(norm(self.model, "final_norm."))
            yield Unit("head", (*before, self._table("head.weight")), stays=True)

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
                yield from norm(model, "final_norm.")
            for i in range(model.mtp.heads):
                yield from norm(model, f"mtp.{i}.hidden_norm.")
                yield from norm(model, f"mtp.{i}.embedding_norm.")
                yield Weight((model.hidden, 2 * model.hidden), f"mtp.{i}.proj.weight")

    def _block(self, model: ModelConfig, name: str, *, stays: bool) -> list[Unit]:
        """Of the block `name`, which `model` describes."""
        weights = tuple(beside_experts(model, self.shape, name))
        stacks = tuple(experts(model, self.shape, name)) if model.ffn.kind == "moe" else ()
        if stacks and self.experts_apart:
            return [Unit("experts", stacks, stays), Unit("block", weights, stays)]
        return [Unit("block", (*weights, *stacks), stays)]
