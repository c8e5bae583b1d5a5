"""`--dry-run`: resolve, plan, count, build every role of the mesh, then one real step of a miniature with the same options."""

import math

import torch

from llmtrain.config.attention import AttentionConfig, MLAConfig
from llmtrain.config.ffn import FFNConfig, MoEConfig
from llmtrain.config.memory import memory_estimate
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, worth_saying
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan


def miniature(model: ModelConfig) -> ModelConfig:
    """The same model options at 2 layers, head dim 16 and a vocabulary of 256; a mixture of experts with dense layers has one of them."""
    small = {"pretrained": None, "layers": 2, "hidden": 64, "vocab_size": 256, "attention": _attention(model), "ffn": _feed_forward(model)}
    return model.model_copy(update=small)


def _attention(model: ModelConfig) -> AttentionConfig | MLAConfig:
    a = model.attention
    if a.kind == "mla":
        narrow = {"query_rank": None if a.query_rank is None else 32, "kv_rank": 32, "softmax_scale": None}
        return a.model_copy(update=narrow | {"heads": 4, "nope_dim": 16, "rope_dim": 16, "value_dim": 16})
    return a.model_copy(update={"heads": 2 * a.heads // model.kv_heads, "kv_heads": 2, "head_dim": 16})


def _feed_forward(model: ModelConfig) -> FFNConfig | MoEConfig:
    ffn = model.ffn
    if ffn.kind == "dense":
        return ffn.model_copy(update={"hidden": 64})
    groups = {name: group.model_copy(update={"sequences": 1}) for name in ("balance", "capacity") if (group := getattr(ffn, name))}
    widths = {"hidden": 64, "dense_hidden": 64, "descend": 16 if ffn.descend else None}
    return ffn.model_copy(update=groups | widths | {"dense_layers": min(1, ffn.dense_layers)})


def dry_run(cfg: RunConfig) -> int:
    """Print the plan, the parameters and the memory of `cfg` and try a step of its miniature. Returns the exit code."""
    from llmtrain.device import select
    from llmtrain.parallel.check import check_parallel
    from llmtrain.stages.pretrain import with_vocabulary

    cfg = with_vocabulary(cfg)
    plan, shape = StepPlan.from_config(cfg), MeshShape.from_config(cfg.parallel)
    check_parallel(cfg, shape, plan, device=select(cfg.device).kind)
    print(f"plan: {plan.steps:,} steps, {plan.tokens:,} tokens, {len(plan.phases)} phase(s); mesh: {shape.describe()}")
    for phase in plan.phases:
        print(f"  {phase.name}: {phase.steps:,} steps x {phase.seq_len:,} tokens, RoPE base {phase.rope_base:g}, peak lr {phase.peak_lr:g}")
    for part, count in worth_saying(count_parameters(cfg.model)).items():
        print(f"  {part:28s} {count:>18,}")
    for part, size in memory_estimate(cfg, world=shape.world).items():
        print(f"  {part:28s} {size / 2**30:>14.2f} GiB a rank")
    built = _count_on_meta(cfg)
    print(f"built on meta: {built:,} parameters")
    if shape.world > 1:
        from llmtrain.stages.dry_mesh_report import dry_mesh

        dry_mesh(cfg, plan, shape)
    loss, mtp = _one_step(cfg), cfg.model.mtp
    losses = 1 + (mtp.loss_weight if mtp.heads else 0)
    expected = f"{f'{losses:g} x ' if mtp.heads else ''}ln 256 = {losses * math.log(256):.3f}"
    print(f"one step of a 2-layer miniature with these options: loss {loss:.3f} ({expected})")
    return 0


def _count_on_meta(cfg: RunConfig) -> int:
    from llmtrain.device import select
    from llmtrain.model import family
    from llmtrain.ops import resolve
    from llmtrain.stages.session import op_call

    ops = resolve(cfg.kernels, op_call(cfg, select(cfg.device)))
    with torch.device("meta"):
        model = family.build(cfg.model, ops, cfg.train.loss_chunk)
    return sum(parameter.numel() for parameter in model.parameters())


def _one_step(cfg: RunConfig) -> float:
    from llmtrain.config.train import ParallelConfig
    from llmtrain.device import select
    from llmtrain.engine.base import ENGINES
    from llmtrain.engine.megatron import build as _megatron  # noqa: F401
    from llmtrain.engine.native import build as _native  # noqa: F401
    from llmtrain.model.objective import cross_entropy
    from llmtrain.ops import resolve
    from llmtrain.parallel import mesh as world
    from llmtrain.stages.session import op_call

    alone = cfg.model_copy(update={"model": miniature(cfg.model), "parallel": ParallelConfig()})
    device = select(cfg.device)
    mesh = world.start(alone.parallel, device=device)
    try:
        ops = resolve(cfg.kernels, op_call(alone, device))
        engine = ENGINES[cfg.engine.kind](alone, objective=cross_entropy, mesh=mesh, device=device, ops=ops)
        tokens = torch.arange(64).remainder(256)[None]
        lengths = ((32, 32),) if cfg.data.document_mask else None
        batch = Batch(tokens=tokens, targets=tokens.roll(-1, 1), positions=torch.arange(64)[None], documents=lengths, samples=(0,))
        result = engine.forward_backward([batch])
        engine.apply(lr=cfg.optim.lr)
        return result.loss
    finally:
        world.stop(mesh)
