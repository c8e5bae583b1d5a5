"""How the engines of this package run a step: which axes they have, what their ranks share, what overlaps (docs/engines.md)."""

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import BYTES
from llmtrain.config.run import RunConfig
from llmtrain.hardware import Hardware
from llmtrain.simulate.case import Case
from llmtrain.simulate.habits import Habits

ZERO = ("none", "zero1", "zero2", "zero3")
"""`Case.shard` by engine deepspeed's `engine.zero`."""


def habits_of(cfg: RunConfig, hardware: Hardware, *, pipeline: bool, engine: str | None = None) -> Habits:
    """Of the engine that `cfg` names, or of `engine`; of one that is not of this package, as of native."""
    kind = engine or cfg.engine.kind
    if kind == "deepspeed":
        return _deepspeed(cfg)
    return _megatron(cfg) if kind == "megatron" else _native(cfg, hardware, pipeline=pipeline)


def _native(cfg: RunConfig, hardware: Hardware, *, pipeline: bool) -> Habits:
    """FSDP over fp32 masters, a loss in pieces, gradients reduced once a step."""
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
        stops_early=True,
    )


def _deepspeed(cfg: RunConfig) -> Habits:
    """ZeRO: weights as wide as the products beside fp32 masters; from stage 2 on gradients are reduced after every micro-batch."""
    return Habits("deepspeed", dp_hidden=False, chunked_loss=True, reduces_each=True, stops_early=True, **_weights(cfg))


def _megatron(cfg: RunConfig) -> Habits:
    """megatron-core: sequence parallelism with every tp, the distributed optimizer (ZeRO 1), its loss in place; nothing is overlapped."""
    return Habits("megatron", dp_hidden=False, gathers_rows=True, logit_bytes=6, **_weights(cfg))


def _weights(cfg: RunConfig) -> dict:
    """In fp32 the weights are the masters."""
    width = BYTES[cfg.precision.compute]
    return {"weight_bytes": width, "reuses_master": width == 4}


def fits(engine: str, case: Case, model: ModelConfig) -> bool:
    """Whether the engine has the axes, the schedule and the recomputation of `case`."""
    if engine == "deepspeed":
        return case.tp == case.pp == case.cp == case.ep == 1 and not case.recompute - {"full"}
    if engine == "megatron":
        plain = case.hierarchical == 1 and not case.overlap_micro_batches and not case.recompute - {"full"}
        ahead = model.mtp.heads and case.pp > 1 and (case.virtual > 1 or model.tie_embeddings)
        return plain and not model.kv_heads % case.tp and case.kind in ("1f1b", "interleaved") and not ahead
    return True


def sharings(engine: str, case: Case) -> tuple[str, ...]:
    """What the ranks of dp may share."""
    if engine == "native":
        return (case.shard,)
    if case.dp * case.cp == 1:
        return ("none",)
    return ZERO[1:] if engine == "deepspeed" else ("zero1",)
