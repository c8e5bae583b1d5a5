"""What is priced: a model, a mesh and a step on a machine, whichever framework runs it."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.layout.schedule import placement_of, resolve
from llmtrain.layout.schedule_actions import stage_rank
from llmtrain.simulate.habits import Habits

FP8, FP4 = "float8_e4m3fn", "float4_e2m1fn_x2"
LOW = (FP8, FP4)
"""Formats of products alone; everything else is in 16 bits."""


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer step of one model on one mesh. Cases are equal only if they are the same object."""

    model: ModelConfig
    hardware: Hardware
    habits: Habits = field(default_factory=Habits)
    seq_len: int = 4096
    micro_batch: int = 1
    micros: int = 1
    """Micro-batches of a step that pass through one pipeline."""
    tp: int = 1
    pp: int = 1
    virtual: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    replicas: int = 1
    """Parts of dp that hold whole copies (dp_replicate)."""
    schedule: str = "auto"
    layers: tuple[int, ...] | None = None
    """Blocks by stage; even if not given."""
    shard: str = "none"
    """`none`, `zero1` (optimizer), `zero2` (gradients too) or `zero3` (parameters too)."""
    reshard: bool = True
    """zero3: parameters are gathered again for the backward pass."""
    recomputed: float = 1.0
    """Share of the blocks that `full` in `recompute` covers."""
    recompute: frozenset[str] = frozenset()
    """Of full, attention, half_products, activation, norms, mla_up, permute, experts, moe, selective."""
    dtype: str = "bfloat16"
    """Format of the products."""
    parameter_bytes: int = 4
    """Of a master weight, and of each moment."""
    imbalance: float | None = None
    """Tokens of the busiest rank of experts over the mean; the fitted one if not given."""
    offload: frozenset[str] = frozenset()
    """Of optimizer and activations: what waits in the host's memory."""
    hierarchical: int = 1
    """Ranks of ep within a node, where dispatch goes to every node once."""
    overlap_micro_batches: bool = False
    """Dispatch of one micro-batch beside the computation of another."""
    cp_kind: str = "ring"

    @property
    def devices(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq_len * self.micro_batch * self.micros * self.dp

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch on a rank of cp."""
        return -(-self.micro_batch * self.seq_len // self.cp)

    @property
    def kind(self) -> str:
        """The pipeline's schedule."""
        return resolve(self.schedule, self.virtual)

    @property
    def stages(self) -> int:
        """Of the pipeline, `virtual` on each of its ranks."""
        return self.pp * self.virtual

    @property
    def spread(self) -> bool:
        """Whether what lies between the branches is split over tp."""
        return self.habits.tp_ranks_share_input and self.tp > 1

    @cached_property
    def split(self) -> tuple[int, ...]:
        """Blocks by stage."""
        if self.layers is not None:
            return self.layers
        least, more = divmod(self.model.layers, self.stages)
        return tuple(least + (stage < more) for stage in range(self.stages))

    def rank_of(self, stage: int) -> int:
        """The rank along pp that holds `stage`."""
        return stage_rank(stage, ranks=self.pp, placement=placement_of(self.kind))

    @property
    def sharing(self) -> int:
        """Ranks that hold each expert once between them."""
        return self.dp * self.cp * self.tp // self.etp

    @cached_property
    def part(self) -> tuple:
        """What the work of a block, of embedding and head depends on, for one model, machine and framework."""
        mesh = (self.tp, self.cp, self.ep, self.etp, self.hierarchical, self.cp_kind, self.overlap_micro_batches)
        return (
            *mesh,
            self.seq_len,
            self.micro_batch,
            self.recompute,
            self.recomputed,
            self.dtype,
            self.imbalance,
            self.offload,
            self.habits,
        )

    @property
    def wide(self) -> str:
        """The format that MFU refers to: that of the products, 16 bits where those are in 8."""
        return "bfloat16" if self.dtype in LOW else self.dtype

    @property
    def peak(self) -> float:
        """FLOP/s of one device in that format. Raises UserError where no source gives it."""
        found = self.hardware.peak_flops(self.wide)
        if found is None:
            raise UserError(f"hardware {self.hardware.key}: no figure of {self.wide} products, so nothing can be predicted")
        return found

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    def value_width(self, model: ModelConfig) -> int:
        """Of a head's values, as its attention kernel takes them."""
        return model.head_dim if self.habits.pads_values and model.attention.kind == "mla" else model.value_head_dim

    @property
    def nodes(self) -> int:
        """Machines."""
        return max(1, -(-self.devices // self.hardware.devices_per_node))

    def with_(self, **changes: object) -> "Case":
        """The same with some values changed."""
        return replace(self, **changes)

    def check(self) -> None:
        """Raises UserError, with the arithmetic, for a mesh that the model does not fit."""
        model = self.model
        if model.attention.heads % self.tp:
            raise UserError(f"tp {self.tp} does not divide model.attention.heads {model.attention.heads}")
        if self.stages > model.layers + 2:
            raise UserError(f"pp {self.pp} x virtual stages {self.virtual} = {self.stages} stages for {model.layers} blocks")
        if self.ep > 1 and (model.ffn.kind != "moe" or model.ffn.experts % self.ep or self.sharing % self.ep):
            raise UserError(f"ep {self.ep} divides neither the experts nor the {self.sharing} ranks that share them")
