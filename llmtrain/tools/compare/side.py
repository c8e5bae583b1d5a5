"""One side of a comparison: a configuration, its weights and batch, and one recorded training step."""

import hashlib
import json
import platform
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.config.train import CheckpointConfig, ParallelConfig
from llmtrain.data.batch import Batch
from llmtrain.device import select
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.base import Engine
from llmtrain.errors import UserError
from llmtrain.layout.steps import Step, StepPlan
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import resolve
from llmtrain.parallel import mesh as world
from llmtrain.stages.pretrain import inputs, with_vocabulary
from llmtrain.stages.pretrained import load_pretrained
from llmtrain.stages.session import Session, op_call
from llmtrain.tools.compare.recorder import Recorder
from llmtrain.tools.compare.settings import LIMIT
from llmtrain.tools.compare.trace import BACKWARD, FORWARD, Trace
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.checkpoint_files import META
from llmtrain.train.console import Console


@dataclass(frozen=True)
class Side:
    """What one side runs: a configuration for one rank, the step of its plan, the batch."""

    words: str
    """The overrides that make this side, as the user gave them."""
    cfg: RunConfig
    step: Step
    batch: Batch


def read_side(source: Path, overrides: list[str], words: str, *, step: int | None = None, rows: int | None = None) -> Side:
    """The side that `words` (such as "device=npu kernels.attention=auto") make of a YAML file or a run folder.

    A run folder brings the weights of its newest checkpoint and the step that comes after it; a file the initial weights and its first
    step. `rows` samples of that step are one micro-batch (train.micro_batch of them if not given).

    Raises:
        UserError: ConfigError for a wrong option, and what the data or the step do not allow.
    """
    given = [*overrides, *as_options(words)]
    at = 0
    if source.is_dir():
        given, at = _with_checkpoint(source, given)
        source = source / "config.yaml"
    cfg = alone(with_vocabulary(load(source, given).run))
    plan = _plan(cfg)
    chosen = plan.step(_existing(at if step is None else step, plan, asked=step is not None))
    return Side(words, cfg, chosen, _batch(cfg, chosen, rows or chosen.micro_batch))


def alone(cfg: RunConfig) -> RunConfig:
    """`cfg` on one rank; blocks are compiled only where it says `on`, since compiled ones hide what is inside them."""
    compiled = cfg.train.compile if cfg.train.compile == "on" else "off"
    return cfg.model_copy(update={"parallel": ParallelConfig(), "train": cfg.train.model_copy(update={"compile": compiled})})


def run_side(side: Side, *, limit: int = LIMIT) -> Trace:
    """Run the forward and backward pass of `side` in this process and record it.

    Raises UserError for what its device or engine cannot do.
    """
    cfg, started = side.cfg, time.perf_counter()
    recorder = Recorder(limit=limit, inner=cfg.train.compile != "on")
    with _engine(side, recorder) as (session, engine):
        _round_weights(engine)
        recorder.weights(engine.state())
        recorder.scale = engine.extra_state().get("loss_scale", {}).get("value", 1.0)
        with recorder.attached(_models(engine)):
            result = engine.forward_backward([side.batch])
        recorder.number("loss", FORWARD, result.loss)
        recorder.number("gradient norm", BACKWARD, engine.grad_norm())
        meta = _meta(side, session)
    order = {phase: i for i, phase in enumerate(("weights", FORWARD, BACKWARD))}
    points = sorted(recorder.points, key=lambda point: order[point.phase])  # stable: execution order within each
    return Trace(points, meta | {"loss": result.loss, "seconds": round(time.perf_counter() - started, 2), "limit": limit})


def measured_norms(side: Side) -> dict[str, float]:
    """norm.c_attention and c_ffn where they are `auto`, as dotted options, measured in the precision of `side`; {} where nothing is.

    Measured on each side they would differ by rounding, and with them the weights.
    """
    norm = side.cfg.model.norm
    if side.cfg.model.pretrained or norm.placement != "depth_scaled_sandwich" or "auto" not in (norm.c_attention, norm.c_ffn):
        return {}
    with _engine(side, Recorder()) as (_, engine):
        _round_weights(engine)
        return {name: round(value, 9) for name, value in engine.calibrate(side.batch).items()}


def with_norms(side: Side, values: dict[str, float]) -> Side:
    """`side` with the values of `measured_norms`."""
    if not values:
        return side
    norm = side.cfg.model.norm.model_copy(update=values)
    model = side.cfg.model.model_copy(update={"norm": norm})
    return Side(side.words, side.cfg.model_copy(update={"model": model}), side.step, side.batch)


class _engine:
    """Context: (session, engine) of a side in a world of its own, with weights in place and gradients dropped at the end."""

    def __init__(self, side: Side, recorder: Recorder):
        self.side, self.recorder = side, recorder

    def __enter__(self) -> tuple[Session, Engine]:
        cfg = self.side.cfg
        device = select(cfg.device)
        device.set_current()
        if reason := device.unsupported_dtype(torch_dtype(cfg.precision.compute)):
            raise UserError(f"precision.compute {cfg.precision.compute}: {reason}")
        self.mesh = world.start(cfg.parallel, device=device)
        try:
            ops = self.recorder.ops(resolve(cfg.kernels, op_call(cfg, device)))
            session = Session(cfg, device, self.mesh, ops, folder=None, console=Console(enabled=False), cores="")
            engine = session.build_engine(cross_entropy)
            engine.begin_phase(rope_base=self.side.step.rope_base)
            if cfg.model.pretrained is not None:
                load_pretrained(session, engine)
        except BaseException:
            world.stop(self.mesh)
            raise
        return session, engine

    def __exit__(self, *_: object) -> None:
        world.stop(self.mesh)


def _round_weights(engine: Engine) -> None:
    """Let every side have the same weights: those of fp32, also where parameters are fp64."""
    state = engine.state()
    for key, tensor in state.items():
        if key.endswith(".weight") and tensor.dtype == torch.float64:
            tensor.copy_(tensor.float())
    engine.load_state(state)


def _models(engine: Engine) -> list[nn.Module]:
    """The modules that an engine trains; [] for one that does not show them, of which weights, ops, loss and norm alone are recorded."""
    if hasattr(engine, "stages"):
        return list(engine.stages.parts.values())
    model = getattr(engine, "model", None) or getattr(engine, "module", None)
    return [model] if isinstance(model, nn.Module) else []


def as_options(words: str) -> list[str]:
    """The words of one side as overrides; the dashes before `section.key=value` may be left out."""
    found: list[str] = []
    for word in shlex.split(words):
        is_value = bool(found) and found[-1].startswith("--") and "=" not in found[-1]
        found.append(word if word.startswith("--") or is_value or "=" not in word else f"--{word}")
    return found


def _with_checkpoint(folder: Path, given: list[str]) -> tuple[list[str], int]:
    """The overrides that start from a run's newest checkpoint, and the steps it has taken."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml; give a YAML file or a run folder")
    found = Checkpointer(folder, CheckpointConfig(), log=lambda text: None, writable=False).find("auto")
    if found is None:
        raise UserError(f"{folder} has no complete checkpoint; give its config.yaml to compare at the initial weights")
    return [f"--model.pretrained={found}", *given], json.loads((found / META).read_bytes())["step"]


def _plan(cfg: RunConfig) -> StepPlan:
    """The run's steps; a configuration without a length has one."""
    if not (cfg.train.steps or cfg.train.tokens or cfg.train.phases):
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": 1})})
    return StepPlan.from_config(cfg)


def _existing(index: int, plan: StepPlan, *, asked: bool) -> int:
    if not asked:  # a run that has ended: its last step once more
        return min(index, plan.steps - 1)
    if not 0 <= index < plan.steps:
        raise UserError(f"--step {index}: the configuration has steps 0 to {plan.steps - 1}")
    return index


def _batch(cfg: RunConfig, step: Step, rows: int) -> Batch:
    if not 1 <= rows <= step.batch:
        raise UserError(f"--rows {rows}: allowed are 1 to {step.batch}, the sequences of this step (train.global_batch)")
    if cfg.data.train:
        return inputs(cfg).dataset_of(step.phase).batch(step.first_sample - step.phase.first_sample, rows)
    if cfg.model.vocab_size is None:
        raise UserError("there is neither data nor a vocabulary: give data.train, or model.vocab_size for random tokens")
    generator = torch.Generator().manual_seed(cfg.seed)
    tokens = torch.randint(cfg.model.vocab_size, (rows, step.seq_len + 1), generator=generator)
    positions = torch.arange(step.seq_len)[None].expand(rows, -1)
    lengths = ((step.seq_len,),) * rows if cfg.data.document_mask else None
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, documents=lengths, samples=tuple(range(rows)))


def _meta(side: Side, session: Session) -> dict:
    batch, device = side.batch, session.device
    digest = hashlib.sha256(repr(batch.documents).encode())
    for tensor in (batch.tokens, batch.targets, batch.positions):
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "side": side.words,
        "device": device.describe(),
        "compute": side.cfg.precision.compute,
        "engine": side.cfg.engine.kind,
        "kernels": {op: choice.name for op, choice in session.ops.choices.items()},
        "config": {**side.cfg.model_dump(mode="json"), "device": device.kind},
        "batch": digest.hexdigest(),
        "data": "data.train" if side.cfg.data.train else "random tokens",
        "step": side.step.index,
        "rows": len(batch),
        "seq_len": side.step.seq_len,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
