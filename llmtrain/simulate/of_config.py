"""The case of one of our own runs: what its configuration does on a machine, as `parallel/` and `layout/` have it."""

from llmtrain.config.parameters import BYTES
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.steps import Segment, StepPlan
from llmtrain.simulate.case import Case, Habits

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def case_of(cfg: RunConfig, hardware: Hardware, devices: int) -> Case:
    """The longest stretch of equal steps of `cfg` on `devices` of a machine. Raises UserError for a mesh or batch that does not fit."""
    if cfg.model.vocab_size is None:
        raise UserError("model.vocab_size is not set; give it, or start from a preset")
    shape = MeshShape.from_config(cfg.parallel, world=devices, local=min(devices, hardware.devices_per_node))
    segment = longest(cfg)
    _check_batch(segment, shape.dp)
    phase, parallel = segment.phase, cfg.parallel
    pipeline = PipelinePlan.from_config(cfg) if shape.pp > 1 else None
    case = Case(
        model=cfg.model,
        hardware=hardware,
        habits=habits(cfg, hardware, pipeline=shape.pp > 1),
        seq_len=phase.seq_len,
        micro_batch=phase.micro_batch,
        micros=segment.batch // (shape.dp * phase.micro_batch),
        tp=shape.tp,
        pp=shape.pp,
        virtual=pipeline.virtual if pipeline else 1,
        cp=shape.cp,
        ep=shape.ep,
        etp=shape.etp,
        dp=shape.dp,
        replicas=shape.dp_replicate,
        schedule=pipeline.kind if pipeline else "auto",
        layers=pipeline.layers if pipeline else None,
        shard="zero3" if shape.shares_parameters else "none",
        reshard=parallel.reshard_after_forward,
        recompute=_recompute(cfg),
        dtype=DTYPES[cfg.precision.compute],
        parameter_bytes=BYTES[cfg.precision.params],
        imbalance=1.0 if cfg.model.ffn.kind == "moe" and cfg.model.ffn.router.force_balance else None,
        offload=frozenset(cfg.train.offload) | ({"optimizer"} if cfg.optim.offload else frozenset()),
        hierarchical=shape.ep_inner or 1,
        overlap_micro_batches=parallel.overlap_micro_batches,
        cp_kind=parallel.cp_kind,
    )
    case.check()
    return case


def habits(cfg: RunConfig, hardware: Hardware, *, pipeline: bool) -> Habits:
    """How this framework computes: FSDP over fp32 masters, a loss in pieces, gradients reduced once a step."""
    parallel = cfg.parallel
    joined = parallel.tp_kind in ("mc2", "symm_mem") or (parallel.tp_kind == "auto" and hardware.vendor == "Huawei")
    return Habits(
        tp_hidden=joined or parallel.tp_chunks > 1,
        dp_hidden=not pipeline,
        ep_hidden=parallel.ep_kind == "fused",
        gradient_bytes=BYTES[cfg.precision.reduce],
        weight_bytes=0,
        chunked_loss=True,
        reduces_once=True,
    )


def longest(cfg: RunConfig) -> Segment:
    """The steps of one batch size and sequence length in which most tokens pass."""
    train = cfg.train
    if not (train.steps or train.tokens or train.phases):
        cfg = cfg.model_copy(update={"train": train.model_copy(update={"epochs": None, "steps": 1})})
    return max(StepPlan.from_config(cfg).segments, key=lambda one: one.steps * one.batch * one.phase.seq_len)


def _check_batch(segment: Segment, dp: int) -> None:
    if segment.batch % (dp * segment.phase.micro_batch):
        raise UserError(
            f"a batch of {segment.batch} sequences does not split over {dp} data-parallel ranks x micro-batches of "
            f"{segment.phase.micro_batch}; change train.global_batch or train.micro_batch"
        )


def _recompute(cfg: RunConfig) -> frozenset[str]:
    what = cfg.train.recompute
    return frozenset(what) if isinstance(what, list) else frozenset() if what == "none" else frozenset({what})
