"""The pipeline of a run: which blocks each stage holds, which rank holds each stage, and the schedule of a step."""

from dataclasses import dataclass

from llmtrain.config.run import RunConfig
from llmtrain.layout.schedule import Schedule, bubble, build, forward_only, placement_of, resolve, stage_rank
from llmtrain.layout.stages import split_layers


@dataclass(frozen=True)
class PipelinePlan:
    """Stages of a pipeline as arithmetic."""

    kind: str
    """The schedule."""
    ranks: int
    virtual: int
    """Stages per rank."""
    layers: tuple[int, ...]
    """Blocks of each stage."""
    copies_embedding: bool
    """Whether the last stage holds the token embedding too."""
    pairs: bool = False
    """Whether a forward and a backward are to overlap."""

    @classmethod
    def from_config(cls, cfg: RunConfig) -> "PipelinePlan":
        """The plan of parallel.pp, schedule, virtual_stages and layers_per_stage; raises UserError for what does not fit."""
        parallel, model = cfg.parallel, cfg.model
        kind = resolve(parallel.schedule, parallel.virtual_stages)
        virtual = 2 if placement_of(kind) == "v" and parallel.virtual_stages == 1 else parallel.virtual_stages
        stages = parallel.pp * virtual
        layers = split_layers(
            model,
            stages,
            seq_len=cfg.train.seq_len,
            given=parallel.layers_per_stage,
            ranks=parallel.pp,
            placement=placement_of(kind),
        )
        copies = model.tie_embeddings or model.mtp.heads > 0
        return cls(kind, parallel.pp, virtual, layers, copies, parallel.overlap_micro_batches)

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.ranks * self.virtual

    @property
    def splits_backward(self) -> bool:
        """Whether its schedule computes gradients of inputs and of weights apart."""
        return self.kind in ("zero_bubble", "zbv", "dualpipev")

    def rank_of(self, stage: int) -> int:
        """The rank, along pp, that holds `stage`."""
        return stage_rank(stage, ranks=self.ranks, placement=placement_of(self.kind))

    def stages_of(self, rank: int) -> list[int]:
        """Stages of a rank, in order."""
        return [stage for stage in range(self.stages) if self.rank_of(stage) == rank]

    def blocks(self, stage: int) -> range:
        """Numbers of the blocks of `stage`."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def schedule(self, micro_batches: int) -> Schedule:
        """Who does what when in a step of so many micro-batches; raises UserError for a number that the schedule cannot serve."""
        return build(self.kind, ranks=self.ranks, virtual_stages=self.virtual, micro_batches=micro_batches, pairs=self.pairs)

    def describe(self, micro_batches: int) -> str:
        """The stages, and the share of a step in which ranks wait for others if B = 2 F and nothing is sent, in one line."""
        blocks = ", ".join(map(str, self.layers))
        idle = bubble(self.schedule(micro_batches))
        return (
            f"{self.kind}, blocks by stage {blocks}; {micro_batches} micro-batches leave a bubble of {idle:.1%} (B = 2F, no communication)"
        )

    def forwards(self, micro_batches: int) -> Schedule:
        """The same stages for any number of micro-batches that only go forward."""
        kind = "gpipe" if placement_of(self.kind) == "loop" else "zbv"
        return forward_only(build(kind, ranks=self.ranks, virtual_stages=self.virtual, micro_batches=1), micro_batches=micro_batches)
