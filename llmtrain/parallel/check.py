"""What can be known to be wrong about a mesh before any rank starts."""

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.steps import StepPlan
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
    if shape.pp > 1:
        pipeline = PipelinePlan.from_config(cfg)
        if cfg.train.recompute == "selective" and pipeline.splits_backward:
            raise UserError(
                f"train.recompute selective: torch allows its blocks one backward pass, which parallel.schedule {cfg.parallel.schedule} "
                f"makes in two halves; name modules (train.recompute: [norms, activation]), or take full"
            )
        for segment in plan.segments:
            pipeline.schedule(segment.batch // (shape.dp * segment.phase.micro_batch))
    elif cfg.parallel.virtual_stages > 1:
        raise UserError(f"parallel.virtual_stages {cfg.parallel.virtual_stages} needs a pipeline: set parallel.pp, or virtual_stages to 1")
