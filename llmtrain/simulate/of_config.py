"""The case of one of our own runs: what its configuration does on a machine, as `parallel/` and `layout/` have it."""

from llmtrain.config.parameters import BYTES
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.steps import Segment, StepPlan
from llmtrain.simulate.case import Case
from llmtrain.simulate.engines import ZERO, habits_of

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
        habits=habits_of(cfg, hardware, pipeline=shape.pp > 1),
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
        replicas=shape.dp_replicate if cfg.engine.kind == "native" else 1,
        schedule=pipeline.kind if pipeline else "auto",
        layers=pipeline.layers if pipeline else None,
        shard=_shard(cfg, shape),
        reshard=parallel.reshard_after_forward,
        recompute=_recompute(cfg),
        dtype=DTYPES[cfg.precision.compute],
        parameter_bytes=BYTES[cfg.precision.params],
        imbalance=1.0 if cfg.model.ffn.kind == "moe" and cfg.model.ffn.router.force_balance else None,
        offload=frozenset(cfg.train.offload) | ({"optimizer"} if _optimizer_away(cfg) else frozenset()),
        hierarchical=shape.ep_inner or 1,
        overlap_micro_batches=parallel.overlap_micro_batches,
        cp_kind=parallel.cp_kind,
    )
    case.check()
    return case


def longest(cfg: RunConfig) -> Segment:
    """The steps of one batch size and sequence length in which most tokens pass."""
    train = cfg.train
    if not (train.steps or train.tokens or train.phases):
        cfg = cfg.model_copy(update={"train": train.model_copy(update={"epochs": None, "steps": 1})})
    return max(StepPlan.from_config(cfg).segments, key=lambda one: one.steps * one.batch * one.phase.seq_len)


def _shard(cfg: RunConfig, shape: MeshShape) -> str:
    if cfg.engine.kind == "deepspeed":
        return ZERO[cfg.engine.zero if shape.dp > 1 else 0]
    if cfg.engine.kind == "megatron":
        return "zero1" if shape.dp // shape.dp_replicate > 1 else "none"
    return "zero3" if shape.shares_parameters else "none"


def _optimizer_away(cfg: RunConfig) -> bool:
    return cfg.optim.offload or getattr(cfg.engine, "offload_optimizer", "none") != "none"


def _check_batch(segment: Segment, dp: int) -> None:
    if segment.batch % (dp * segment.phase.micro_batch):
        raise UserError(
            f"a batch of {segment.batch} sequences does not split over {dp} data-parallel ranks x micro-batches of "
            f"{segment.phase.micro_batch}; change train.global_batch or train.micro_batch"
        )


def _recompute(cfg: RunConfig) -> frozenset[str]:
    what = cfg.train.recompute
    return frozenset(what) if isinstance(what, list) else frozenset() if what == "none" else frozenset({what})
