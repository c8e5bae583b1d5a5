"""How a model is trained: optimizer, schedule, phases, precision, the mesh, checkpoints, metrics, guards."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.config import shortforms
from llmtrain.config.base import Section
from llmtrain.config.deepspeed import DeepSpeedEngineConfig
from llmtrain.config.sparing import Offloaded, Recomputed

DType = Literal["fp64", "fp32", "bf16", "fp16"]


class OptimConfig(Section):
    """AdamW with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate, unless a phase's schedule gives its own."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    no_decay: list[str] = ["*.bias", "*_bias"]
    """Parameters without weight decay, as shell patterns over canonical names (Pangu Ultra decays its norms)."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm; None does not clip."""
    offload: bool = False
    """Keep the moments in the host's memory; a step brings them to the device a sixteenth at a time."""


class ScheduleConfig(Section):
    """Learning rate over the steps of a phase: warm-up, then the kind's curve."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine` to final_lr; `wsd`: constant, then linear to final_lr over the last decay_fraction; `constant`."""
    lr: PositiveFloat | None = None
    """Peak; optim.lr if not given."""
    final_lr: NonNegativeFloat | None = None
    """Where cosine and wsd end; a tenth of the peak if not given."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from 0 over these steps."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the phase that wsd decays over."""


class BatchRamp(Section):
    """From a token count on, a batch size."""

    from_tokens: NonNegativeInt
    """Tokens of this phase after which the size holds."""
    size: PositiveInt
    """Sequences per optimizer step."""


class PhaseConfig(Section):
    """A stretch of training with its own sequence length, batch, RoPE base, schedule and mix."""

    name: str | None = None
    """Name in the metrics."""
    tokens: PositiveInt | None = None
    """Length in tokens, rounded up to whole steps; give this or steps."""
    steps: PositiveInt | None = None
    """Length in optimizer steps."""
    seq_len: PositiveInt | None = None
    """Tokens per sequence; train.seq_len if not given."""
    batch: PositiveInt | list[BatchRamp] | None = None
    """Sequences per optimizer step, or a ramp; train.global_batch if not given."""
    micro_batch: PositiveInt | None = None
    """Sequences per forward pass on one rank; train.micro_batch if not given."""
    rope_base: PositiveFloat | None = None
    """RoPE base from this phase on; model.position.base if not given."""
    schedule: ScheduleConfig | None = None
    """Learning rate of the phase; the run's schedule if not given."""
    mix: dict[str, NonNegativeFloat] | None = None
    """Weight per source name; the sources' own weights if not given."""

    @model_validator(mode="after")
    def _one_length(self) -> "PhaseConfig":
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("a phase needs exactly one of tokens and steps")
        return self


class TrainConfig(Section):
    """Length and batch of the run."""

    steps: PositiveInt | None = None
    """Optimizer steps; give this, tokens, epochs or phases."""
    tokens: PositiveInt | None = None
    """Length in tokens, rounded up to whole steps."""
    epochs: PositiveFloat | None = None
    """Length in passes over data.train, each of its sources once, rounded up to whole steps."""
    phases: list[PhaseConfig] = []
    """Phases in order; each may change sequence length, batch, RoPE base, schedule and mix."""
    seq_len: PositiveInt = 1024
    """Tokens per sequence."""
    global_batch: PositiveInt = 8
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt = 1
    """Sequences per forward pass on one rank."""
    recompute: Literal["none", "selective", "full"] | list[Recomputed] = "none"
    """What the backward pass computes again instead of keeping it: nothing, all but matmuls and attention, whole blocks; or a list of
    modules of each block: `mla_up` (queries, keys and values from the narrow vectors of latent attention), `norms`, `activation` (of dense
    branches and experts), `permute` (rows at their experts, which are sent again)."""
    offload: list[Offloaded] = []
    """Activations that wait in the host's memory for the backward pass, which fetches those of a block while it works on the one after:
    `block_input`, `attention_input` and `ffn_input` (what the norms before these branches give), `expert_output` (kept for the gradients
    of the router's probabilities)."""
    deterministic: bool = False
    """Only deterministic kernels and collectives, so that a run repeated gives the same bits; slower, and ops that have none raise."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks: `auto` where it pays within the run's length. The first step of each sequence length takes longer."""
    loss_chunk: PositiveInt | None = None
    """Tokens whose logits exist at once in the loss; the S x V logits never exist whole. If not given: 32 MiB of them, 256 to 1,024."""
    validate_every: NonNegativeInt = 0
    """Steps between validations, 0 for none; a run with validation data always validates at its end."""
    validate_samples: PositiveInt = 64
    """Sequences of each validation source that are evaluated, always the same ones; all of a source that has fewer."""

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_by_flag(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        given = [n for n in ("steps", "tokens", "epochs") if getattr(self, n) is not None] + ["phases"] * bool(self.phases)
        if len(given) > 1:
            raise ValueError(
                f"give one of steps, tokens, epochs and phases, not {' and '.join(given)}; null (for phases []) takes a value back"
            )
        return self


class ExpertPlacementConfig(Section):
    """Which rank of ep holds which experts, by how many tokens these get: checked now and then, and changed where that helps."""

    every: PositiveInt = 50
    """Steps between checks."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of the average of an expert's tokens stays when a step is added; 0 looks at the last step alone."""
    gain: NonNegativeFloat = 0.08
    """Experts of a layer move if the coefficient of variation (std / mean) of its ranks' tokens falls by at least this much."""


class ParallelConfig(Section):
    """The mesh: how many ranks along each axis."""

    pp: PositiveInt = 1
    """Pipeline stages."""
    dp_replicate: PositiveInt = 1
    """Replicas of the (sharded) model."""
    dp_shard: PositiveInt | Literal[-1] = 1
    """Ranks that share one copy of the parameters (FSDP2); -1 takes all ranks left over."""
    cp: PositiveInt = 1
    """Ranks that share one sequence."""
    tp: PositiveInt = 1
    """Ranks that share one layer."""
    ep: PositiveInt = 1
    """Ranks that share the experts, laid over dp_shard x cp, and over tp too where etp is 1."""
    etp: PositiveInt = 1
    """Ranks that share one expert: 1, and tp ranks hold whole experts and send their own part of the sequence, or tp."""
    tp_chunks: PositiveInt = 1
    """Pieces in which tensor parallelism sends activations, each while another one is multiplied; 1 does one after the other."""
    tp_kind: Literal["auto", "chunked", "symm_mem", "mc2"] = "auto"
    """How activations are sent beside the products of tp: in tp_chunks, by torch's kernels over symmetric memory (CUDA alone), or by
    torch_npu's operators (NPU alone); `auto` is mc2 on an NPU where that can serve, else chunked."""
    ep_kind: Literal["auto", "all_to_all", "hierarchical", "fused"] = "auto"
    """How tokens reach the experts of other ranks: by all-to-alls; once to each other node and from there by all-to-alls within it
    (`ep_inner`); or by torch_npu's operators that join all-to-alls with the experts' products (Atlas A3 alone). `auto` is fused where that
    can serve, else all_to_all."""
    ep_inner: PositiveInt | None = None
    """Ranks of ep that are taken to be of one node by ep_kind hierarchical; if not given, tp where experts are laid over it, else those
    that the launcher started on a node."""
    expert_placement: ExpertPlacementConfig | None = None
    """Move experts between the ranks of ep so that all get about as many tokens; if not given, each rank keeps those that follow each
    other."""
    cp_kind: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    """How the ranks of cp attend to each other's keys: gather all of them, pass them round a ring, or exchange sequence for heads."""
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"] = "auto"
    """Order of the micro-batches in a pipeline; `auto` is 1f1b, or interleaved with several virtual stages."""
    virtual_stages: PositiveInt = 1
    """Stages of the pipeline that one rank holds."""
    overlap_micro_batches: bool = False
    """Compute the forward pass of one micro-batch while tokens of another's backward pass travel to their experts, and the other way round:
    in the pairs of schedule dualpipev, or of interleaved, which then runs one more forward ahead."""
    layers_per_stage: list[NonNegativeInt] | None = None
    """Blocks of each stage, first to last, pp x virtual_stages of them; balanced by cost if not given."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass and gather them again for the backward pass."""
    timeout: PositiveFloat = 600.0
    """Seconds a collective may take before the run is stopped."""
    hccl_buffer_mb: PositiveInt | None = None
    """MiB that HCCL keeps per group for sending, and as many again for receiving; HCCL_BUFFSIZE, or 200, if not given. For NPUs alone."""
    affinity: Literal["auto", "off"] = "auto"
    """`auto` binds each rank of a machine to processor cores of its own, near its accelerator; `off` leaves that to the launcher."""
    threads: PositiveInt | None = None
    """Threads of an op on the CPU; OMP_NUM_THREADS if set, else the rank's physical cores within the control group's limit."""


class NativeEngineConfig(Section):
    """PyTorch's own pieces: FSDP2, DTensor."""

    kind: Literal["native"] = "native"
    """The engine."""


class MegatronEngineConfig(Section):
    """megatron-core's layers, schedules and optimizer (docs/megatron.md)."""

    kind: Literal["megatron"]
    """The engine."""


class LossScaleConfig(Section):
    """Dynamic loss scale for fp16."""

    init: PositiveFloat = 65536.0
    """First scale."""
    growth_every: PositiveInt = 2000
    """Steps without overflow after which the scale doubles."""
    min: PositiveFloat = 1.0
    """An overflow at this scale stops the run."""


class PrecisionConfig(Section):
    """Number formats. `precision: bf16` is short for `{compute: bf16}`; `precision: fp64` sets all of them."""

    compute: DType = "fp32"
    """Matrix products and activations."""
    params: Literal["fp64", "fp32"] = "fp32"
    """Parameters as stored and updated: the master weights."""
    reduce: DType = "fp32"
    """Gradient reduction over ranks."""
    accumulate: DType = "fp32"
    """Gradient accumulation over micro-batches."""
    optimizer: Literal["fp64", "fp32"] = "fp32"
    """Optimizer moments."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Used when compute is fp16."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        return shortforms.precision(values)


class CheckpointConfig(Section):
    """When state is saved, and what is kept."""

    every: NonNegativeInt = 100
    """Steps between checkpoints, 0 for the last step only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Steps whose multiples are kept for good."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    resume: str = "auto"
    """`auto`: the newest complete checkpoint of the run folder, if any. `none`: start anew. Else a checkpoint folder."""
    export: Literal["none", "hf"] = "none"
    """Also write the final weights as a Hugging Face folder."""


class ProfileConfig(Section):
    """A window recorded by torch.profiler."""

    start: PositiveInt = 10
    """First step recorded."""
    steps: PositiveInt = 3
    """Steps recorded."""
    memory: bool = False
    """Also write a memory snapshot (CUDA)."""


class MetricsConfig(Section):
    """What is written while the run goes on; metrics.jsonl always is."""

    every: PositiveInt = 1
    """Steps between lines."""
    tensorboard: bool = False
    """Write event files to `tb/`."""
    wandb: str | None = None
    """Weights & Biases project."""
    swanlab: str | None = None
    """SwanLab project."""
    profile: ProfileConfig | None = None
    """Record a window of steps."""
    bigram_baseline: bool = False
    """Also compute the validation loss of an interpolated bigram model of the same tokens, for comparison in the report."""
    sample: str | None = None
    """Prompt completed at the end of the run and shown in the report."""
    sample_tokens: PositiveInt = 120
    """Tokens of that sample."""


class SpikeConfig(Section):
    """A step is a spike if its loss or gradient norm exceeds mean + sigmas * std of the last `window` steps that were none."""

    action: Literal["count", "skip", "off"] = "count"
    """Count it, also discard the step, or do not look."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps looked back; nothing is judged before half of them exist."""
    sigmas: PositiveFloat = 6.0
    """How far above the mean."""


class ExpertGuardConfig(Section):
    """Tokens that all go to few experts: a layer beyond either limit in each of `steps` steps in a row."""

    action: Literal["warn", "stop", "off"] = "warn"
    """Say so, once until the layer is within the limits again for as long; end the run with exit code 3; or do not look."""
    load: PositiveFloat | None = None
    """Most tokens of an expert over the mean of all; half way between even use, 1, and the worst, experts / top_k, if not given."""
    entropy: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least entropy of the experts' shares over that of equal ones; half way between the worst, log top_k / log experts, and 1 if not
    given."""
    steps: PositiveInt = 50
    """Steps in a row."""


class GuardsConfig(Section):
    """What stops or skips a step before the optimizer sees it."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient stops the run with exit code 3 and names the samples, or skips the step."""
    spike: SpikeConfig = SpikeConfig()
    """Loss and gradient-norm spikes."""
    experts: ExpertGuardConfig = ExpertGuardConfig()
    """Mixtures of experts that collapse."""
    deadline: str | None = None
    """Save and stop before this moment: an ISO time, or `slurm` for the job's own end."""
    deadline_margin: PositiveFloat = 120.0
    """Seconds before the deadline."""
    hang_report: bool = True
    """Say where every rank is when one has waited in a collective for parallel.timeout, then end all of them with exit code 3."""


EngineConfig = Annotated[NativeEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig, Field(discriminator="kind")]
