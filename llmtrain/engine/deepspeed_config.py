"""What engine deepspeed can run of a configuration, and the configuration that DeepSpeed is given for it."""

import importlib.metadata as metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.compat import cpu_computes_fp16
from llmtrain.config.deepspeed import DeepSpeedEngineConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.train import ParallelConfig
from llmtrain.errors import UserError
from llmtrain.layout.balance import Groups
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan

AXES = ("dp_replicate", "dp_shard")
"""Data parallelism; ZeRO shares what `engine.zero` says over the ranks of both."""
DTYPES = ("fp32", "bf16", "fp16")
TESTED = "0.19.8"
"""The version whose insides `deepspeed_layout` knows; others that begin alike are taken for the same."""
INSTALL = f"DS_BUILD_OPS=0 pip install deepspeed=={TESTED}"


def check(cfg: RunConfig, *, shape: MeshShape, device: str) -> None:
    """Raise UserError naming the option, unless engine deepspeed runs `cfg` on a mesh of this shape and a device of this kind."""
    problems = (problem(cfg, shape, device) for problem in (_mesh, _precision, _memory, _batches, _package))
    if found := next(filter(None, problems), None):
        raise UserError(f"engine deepspeed: {found}")


def of_run(cfg: RunConfig, *, device: str) -> str | None:
    """What of the formats and memory options of `cfg` stands in the way, whatever its mesh and engine."""
    own = cfg.model_copy(update={"engine": DeepSpeedEngineConfig()})
    shape = MeshShape.from_config(ParallelConfig(), world=1)
    return _precision(own, shape, device) or _memory(own, shape, device)


def _package(cfg: RunConfig, shape: MeshShape, device: str) -> str | None:
    if importlib.util.find_spec("deepspeed") is None:
        return f"the package deepspeed is not installed; {INSTALL}"
    version = metadata.version("deepspeed")
    if version.split(".")[:2] != TESTED.split(".")[:2]:
        return f"deepspeed {version} is installed, and its state is read from inside, which is known for {TESTED}; {INSTALL}"
    return None


def _mesh(cfg: RunConfig, shape: MeshShape, device: str) -> str | None:
    for axis in ("pp", "cp", "tp", "ep"):
        if getattr(shape, axis) > 1:
            return f"parallel.{axis} is {getattr(shape, axis)}, but it runs only {', '.join(AXES)}; engine native has {axis}"
    return None


def _precision(cfg: RunConfig, shape: MeshShape, device: str) -> str | None:
    p, zero = cfg.precision, cfg.engine.zero
    if "fp64" in (p.compute, p.params, p.optimizer):
        return f"precision.compute {p.compute}, params {p.params}, optimizer {p.optimizer}: it has no fp64; weights and moments are fp32"
    if p.compute == "fp32" and p.accumulate != "fp32":
        return f"precision.accumulate {p.accumulate}: gradients of precision.compute fp32 are fp32"
    if p.compute != "fp32" and zero == 0:
        return (
            f"precision.compute {p.compute} with engine.zero 0: DeepSpeed has another optimizer without ZeRO, whose numbers differ "
            "(by 4e-3 in the loss after 10 steps where ZeRO 1 differs by 4e-4); set engine.zero 1"
        )
    if {p.accumulate, p.reduce} - {"fp32", p.compute}:
        return f"precision.accumulate {p.accumulate} and precision.reduce {p.reduce}: either fp32 or as precision.compute ({p.compute})"
    if p.compute == "fp16" and device == "cpu" and not cpu_computes_fp16():
        return "precision.compute fp16: DeepSpeed refuses it on a CPU for which oneDNN has no fp16 (AVX512-FP16), as this one; take bf16"
    return None


def _memory(cfg: RunConfig, shape: MeshShape, device: str) -> str | None:
    engine = cfg.engine
    if cfg.optim.offload:
        return "optim.offload is engine native's; set engine.offload_optimizer cpu"
    if engine.offload_optimizer != "none" and engine.zero == 0:
        return f"engine.offload_optimizer {engine.offload_optimizer} needs engine.zero 1 to 3, not 0"
    if engine.offload_params != "none" and engine.zero != 3:
        return f"engine.offload_params {engine.offload_params} needs engine.zero 3, not {engine.zero}"
    if engine.offload_optimizer == "nvme" and engine.zero != 3:
        return f"engine.offload_optimizer nvme needs engine.zero 3, not {engine.zero}; cpu goes with 1 to 3"
    if engine.swaps and (engine.nvme_path is None or not Path(engine.nvme_path).is_dir()):
        return f"engine.nvme_path {engine.nvme_path} is no folder; offloading to nvme needs one on a disk of this machine"
    if cfg.train.offload:
        return "train.offload keeps activations on the host for engine native alone; take it out"
    if cfg.train.compile == "on":
        return "train.compile on: blocks run uncompiled; set it to auto or off"
    return None


def _batches(cfg: RunConfig, shape: MeshShape, device: str) -> str | None:
    ffn = cfg.model.ffn
    if ffn.kind != "moe" or cfg.train.epochs is not None:  # epochs are steps by the time the engine is built
        return None
    for segment in StepPlan.from_config(cfg).segments:
        phase, dp = segment.phase, shape.dp
        groups = Groups.of_step(ffn.balance, batch=segment.batch, rows=phase.micro_batch, seq_len=phase.seq_len, ranks=dp)
        if groups.window > 1:
            return (
                f"model.ffn.balance.sequences {groups.size} joins {groups.window} micro-batches, which all have to go forward before one "
                f"goes backward, and DeepSpeed counts them as they go; set it to a divisor of {phase.micro_batch * dp}"
            )
    return None


def deepspeed_config(cfg: RunConfig, *, sizes: Sequence[int], files: str | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration of a checked run; `sizes` of parameters, in elements, bound its buffers, `files` is for what is swapped."""
    precision, zero = cfg.precision, cfg.engine.zero
    ours = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch,  # not used: micro-batches and their number are told at each step
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
        "communication_data_type": precision.reduce,
        "data_types": {"grad_accum_dtype": precision.accumulate},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(cfg, sizes, files),
    }
    if precision.compute != "fp32":
        ours[precision.compute] = {"enabled": True} | ({"loss_scale": 1.0} if precision.compute == "fp16" else {})
    if zero == 0:
        ours["zero_optimization"] = {"stage": 0}
    return _merged(ours, cfg.engine.options)


def _zero(cfg: RunConfig, sizes: Sequence[int], files: str | None) -> dict[str, Any]:
    engine = cfg.engine
    places = {"cpu": {"device": "cpu", "pin_memory": False}, "nvme": {"device": "nvme", "pin_memory": False, "nvme_path": files}}
    bucket = min(500_000_000, -(-sum(sizes) // 2) * 2)
    zero: dict[str, Any] = {"stage": engine.zero, "reduce_bucket_size": bucket}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = places[engine.offload_optimizer]
    if engine.zero == 3:
        zero |= {"stage3_prefetch_bucket_size": min(50_000_000, bucket), "memory_efficient_linear": False}
        if engine.offload_params != "none":
            buffers = {"buffer_size": max(sizes), "max_in_cpu": 0} if engine.offload_params == "nvme" else {}
            zero["offload_param"] = places[engine.offload_params] | buffers
        return zero
    own_norm = engine.offload_optimizer != "none" or (engine.zero == 1 and cfg.precision.compute == "bf16")
    return zero | {"allgather_bucket_size": bucket, "compute_grad_norm": own_norm}


def _merged(ours: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts merged, `more` winning."""
    nested = {key: _merged(ours[key], value) for key, value in more.items() if isinstance(value, dict) and isinstance(ours.get(key), dict)}
    return ours | more | nested
