"""What can be known to be wrong about a mesh before any rank starts."""

from llmtrain.config.ffn import MoEConfig
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.balance import Groups
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.steps import Segment, StepPlan
from llmtrain.parallel.choices import choices
from llmtrain.parallel.cp import check_cp
from llmtrain.parallel.ep import check_ep
from llmtrain.parallel.tp import check_tp


def check_parallel(cfg: RunConfig, shape: MeshShape, plan: StepPlan, *, device: str) -> None:
    """Raise UserError, with the arithmetic and the option to change, unless model, batches and `device` (cpu, cuda, npu) fit the mesh."""
    plan.check_batches(dp=shape.dp)
    if shape.tp > 1:
        check_tp(cfg.model, shape.tp)
    if shape.cp > 1:
        check_cp(cfg.model, cfg.parallel.cp_kind, cp=shape.cp, tp=shape.tp)
    if shape.ep > 1 or shape.etp > 1:
        check_ep(cfg.model, ep=shape.ep, etp=shape.etp)
    choices(cfg, shape, device=device)
    if cfg.model.ffn.kind == "moe":
        for segment in plan.segments:
            _check_groups(cfg.model.ffn, shape, segment)
    if cfg.parallel.overlap_micro_batches:
        _check_overlap(cfg, shape)
    if shape.pp > 1:
        pipeline = PipelinePlan.from_config(cfg)
        if cfg.train.recompute == "selective" and pipeline.splits_backward:
            raise UserError(
                f"train.recompute selective: torch allows its blocks one backward pass, which parallel.schedule {cfg.parallel.schedule} "
                f"makes in two halves; name modules (train.recompute: [norms, activation]), or take full"
            )
        if cfg.lora.rank and (empty := [stage for stage in range(pipeline.stages) if not pipeline.blocks(stage)]):
            raise UserError(
                f"lora.rank {cfg.lora.rank}: stages {empty} hold no block and so no adapter to train; set parallel.layers_per_stage"
            )
        for segment in plan.segments:
            pipeline.schedule(segment.batch // (shape.dp * segment.phase.micro_batch))
    elif cfg.parallel.virtual_stages > 1:
        raise UserError(f"parallel.virtual_stages {cfg.parallel.virtual_stages} needs a pipeline: set parallel.pp, or virtual_stages to 1")


def _check_overlap(cfg: RunConfig, shape: MeshShape) -> None:
    name = "parallel.overlap_micro_batches"
    if shape.pp == 1 or shape.ep == 1:
        raise UserError(
            f"{name} has a pipeline compute while tokens travel to experts of other ranks: it needs parallel.pp {shape.pp} and "
            f"parallel.ep {shape.ep} of 2 or more"
        )
    if cfg.parallel.ep_kind == "fused":
        raise UserError(f"{name} needs parallel.ep_kind all_to_all or hierarchical, which send and wait apart, not fused")


def _check_groups(ffn: MoEConfig, shape: MeshShape, segment: Segment) -> None:
    """Sequences whose tokens are balanced, or compete for room, together: whole ones, which come together before they are needed."""
    phase, shares = segment.phase, shape.cp * shape.tp
    counted = {
        "balance": ffn.balance,
        "capacity": ffn.capacity,
        "router.bias_rate": ffn.router.bias_rate,
        "router.z_loss": ffn.router.z_loss,
    }
    named = [f"model.ffn.{name}" for name, value in counted.items() if value]
    if named and phase.seq_len % shares:
        raise UserError(
            f"{', '.join(named)}: padding must not count, but the {phase.seq_len} tokens of a sequence ({phase.name}) do not split over "
            f"cp {shape.cp} x tp {shape.tp} = {shares} ranks; make train.seq_len a multiple of {shares}"
        )
    groups = Groups.of_step(ffn.balance, batch=segment.batch, rows=phase.micro_batch, seq_len=phase.seq_len, ranks=shape.dp)
    if shape.pp > 1 and groups.window > 1:
        at_once = phase.micro_batch * shape.dp
        raise UserError(
            f"model.ffn.balance.sequences {groups.size} is {groups.window} times the {at_once} sequences that are computed at once "
            f"(micro_batch {phase.micro_batch} x {shape.dp} data ranks), and a pipeline begins to go backward before they have all gone "
            f"forward: set it to a divisor of {at_once}, or parallel.pp 1"
        )
    if ffn.capacity is not None and phase.micro_batch % ffn.capacity.sequences:
        raise UserError(
            f"model.ffn.capacity.sequences {ffn.capacity.sequences} does not divide the {phase.micro_batch} sequences of a micro-batch "
            f"({phase.name}), which find room among themselves; change it or train.micro_batch"
        )
