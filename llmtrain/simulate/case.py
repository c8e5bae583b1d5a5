"""What is priced: a model, a mesh and a step on a machine, whichever framework runs it."""

from dataclasses import dataclass, replace
from functools import cached_property

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.layout.schedule import placement_of, resolve
from llmtrain.layout.schedule_actions import stage_rank

FP8, FP4 = "float8_e4m3fn", "float4_e2m1fn_x2"
LOW = (FP8, FP4)
"""Formats of products alone; everything else is in 16 bits."""


@dataclass(frozen=True)
class Habits:
    """How a framework computes what it is asked for: few values, the same for every run of it."""

    name: str = "llmtrain"
    fused: bool = True
    """Norms, activations, RoPE and residuals as one kernel each; else several passes (eager PyTorch)."""
    flash: bool = True
    """Attention without the score matrix in memory."""
    older_attention: bool = False
    """FlashAttention 2 rather than kernels written for the GPU's generation."""
    dropout: bool = False
    """Dropout after attention and feed-forward branch, and on the scores where they exist."""
    tp_hidden: bool = False
    """Sends of tensor parallelism go beside the products (MC2, TE userbuffers, async TP)."""
    dp_hidden: bool = True
    """Gradients are reduced beside the backward pass."""
    sends_once: bool = False
    """Dispatch sends a token to each node once, however many of its experts are there (DeepEP, HybridEP)."""
    gathers_rows: bool = False
    """Where tp shares an expert: rows are sent to their experts first and then gathered over tp; else tokens are gathered and then sent."""
    ep_hidden: bool = False
    """Dispatch and combine go beside other work."""
    half_products: bool = False
    """`selective` computes every second product again (torchtitan), not the attention's inside (Megatron)."""
    gradient_bytes: int = 4
    """Of a gradient as it is accumulated and sent."""
    second_gradient: int = 0
    """Bytes of a gradient in the format of the products beside the one that is accumulated."""
    reuses_master: bool = False
    """The 16-bit weight lies in the memory of its fp32 master (MindSpeed's reuse-fp32-param)."""
    keeps_gathered: bool = False
    """What sequence parallelism has gathered for a product stays for its backward pass."""
    copies: bool = False
    """Activations are kept by unfused operators: both factors of the gate, copies around attention, sums of the residual stream."""
    logit_bytes: int = 10
    """Bytes per logit at the peak of the loss."""
    reserved: bool = False
    """Peak memory is what the allocator has reserved, not what tensors take."""
    even_layers: bool = False
    """Every pipeline stage has as many blocks, whatever embedding and head cost."""
    weight_bytes: int = 2
    """Of a parameter beside its fp32 master; 0 where there is the master alone (FSDP)."""
    tp_ranks_share_input: bool = True
    """Sequence parallelism: what lies between the branches is split over tp too."""
    reduces_once: bool = False
    """Gradients of several micro-batches are added up whole and reduced after the last."""
    chunked_loss: bool = False
    """The logits of a few tokens exist at once, not those of the micro-batch."""


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer step of one model on one mesh. Cases are equal only if they are the same object."""

    model: ModelConfig
    hardware: Hardware
    habits: Habits = Habits()
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
    recompute: frozenset[str] = frozenset()
    """Of full, attention, half_products, activation, norms, mla_up, permute, selective."""
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
        return (*mesh, self.seq_len, self.micro_batch, self.recompute, self.dtype, self.imbalance, self.offload, self.habits)

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
