"""What the engine megatron cannot run, each by the option that asks for it. Needs no megatron-core."""

from collections.abc import Iterator

from llmtrain.config.run import RunConfig
from llmtrain.config.train import ParallelConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.packages import installed_version

VERSIONS = ("0.16.1",)
"""Of megatron-core, with which the engine is tested."""
ASCEND = "0.12.1"
"""The one that MindSpeed pins, whose parameters have the same names and shapes (docs/megatron.md)."""


def runs(version: str) -> bool:
    """Whether the engine runs this version of megatron-core: that of VERSIONS, or another one of its minor release."""
    return version.rpartition(".")[0] in {known.rpartition(".")[0] for known in VERSIONS}


def check(cfg: RunConfig, *, shape: MeshShape, device: str) -> None:
    """Raise UserError naming every option of `cfg` that stands in the way; also if megatron-core is missing, or too old or new.

    What `shape` says follows from `cfg`, and on which device it runs is the table's to say (engine/support.py).
    """
    if problems := [*_package(), *_model(cfg), *_mesh(cfg), *_rest(cfg)]:
        raise UserError("engine megatron: " + "; ".join(problems))


def of_model(cfg: RunConfig) -> list[str]:
    """What of the model, formats and memory options of `cfg` stands in the way, whatever its mesh and recomputation."""
    plain = {"parallel": ParallelConfig(), "train": cfg.train.model_copy(update={"recompute": "none"})}
    return [problem for part in (_model, _rest) for problem in part(cfg.model_copy(update=plain))]


def _package() -> Iterator[str]:
    found = installed_version("megatron-core")
    if found is None:
        yield f"megatron-core is not installed; `pip install megatron-core=={VERSIONS[0]}` (Python 3.10 and 3.11) or set engine: native"
    elif not runs(found):
        yield f"megatron-core {found} is installed, the engine knows {', '.join(VERSIONS)}"


def _model(cfg: RunConfig) -> Iterator[str]:
    model, a, ffn, norm = cfg.model, cfg.model.attention, cfg.model.ffn, cfg.model.norm
    if model.family != "transformer":
        yield f"model.family {model.family}: it builds `transformer`"
    if model.mtp.heads:
        yield from _ahead(cfg)
    if "auto" in (norm.c_attention, norm.c_ffn) and norm.placement == "depth_scaled_sandwich":
        yield "model.norm.c_attention or c_ffn auto: measure it with engine native"
    if norm.kind == "layer_norm" and a.kind == "gqa" and a.qk_norm:
        yield "model.attention.qk_norm with model.norm.kind layer_norm: it has one kind of norm"
    biases = (a.qkv_bias, a.out_bias, ffn.bias) if a.kind == "gqa" else (False, False, ffn.bias)
    if biases not in ((False, False, False), (True, False, False), (True, True, True)):
        yield "biases: of model.attention.qkv_bias, out_bias and model.ffn.bias it has none, the first, or all"
    if a.kind == "mla" and a.norm_eps not in (None, norm.eps):
        yield f"model.attention.norm_eps {a.norm_eps}: all norms have model.norm.eps {norm.eps}"
    if ffn.kind == "moe":
        yield from _experts(cfg)


def _ahead(cfg: RunConfig) -> Iterator[str]:
    name = f"model.mtp.heads {cfg.model.mtp.heads}"
    if cfg.model.position.kind == "learned":
        yield f"{name} with model.position.kind learned"
    if cfg.parallel.pp > 1 and cfg.model.tie_embeddings:
        yield f"{name} with model.tie_embeddings and parallel.pp {cfg.parallel.pp}: the last stage would hold two copies of the embedding"
    if cfg.parallel.pp > 1 and cfg.parallel.virtual_stages > 1:
        yield f"{name} with parallel.virtual_stages {cfg.parallel.virtual_stages}"


def _experts(cfg: RunConfig) -> Iterator[str]:
    ffn, router = cfg.model.ffn, cfg.model.ffn.router
    if ffn.bias:
        yield "model.ffn.bias of a mixture of experts"
    if ffn.capacity is not None:
        yield "model.ffn.capacity: drop by engine native"
    if ffn.balance is not None:
        if ffn.balance.sequences not in (1, cfg.train.micro_batch):
            yield f"model.ffn.balance.sequences {ffn.balance.sequences}: 1, or train.micro_batch {cfg.train.micro_batch}"
        if router.bias_rate is not None or router.top_groups < router.groups:
            yield "model.ffn.balance with router.bias_rate or top_groups: its loss counts choices without them"
    if router.force_balance:
        yield "model.ffn.router.force_balance"
    if router.top_groups < router.groups and ffn.top_k != 2 * router.top_groups:
        yield f"model.ffn.router.top_groups {router.top_groups}: it ranks groups by top_k / top_groups scores, ours by two"
    if router.score == "softmax" and not router.renormalise and router.bias_rate is not None:
        yield "model.ffn.router.bias_rate with score softmax that is not renormalised"
    if router.score == "sigmoid" and not router.renormalise:
        yield "model.ffn.router.renormalise false with score sigmoid"
    if router.score == "softmax" and router.bias_rate is not None:
        yield "model.ffn.router.bias_rate with score softmax: it has biases for sigmoid scores alone"


def _mesh(cfg: RunConfig) -> Iterator[str]:
    parallel, model = cfg.parallel, cfg.model
    if parallel.pp > 1 and (kind := PipelinePlan.from_config(cfg).kind) not in ("1f1b", "interleaved"):
        yield f"parallel.schedule {kind}: 1f1b, or interleaved with virtual_stages"
    if parallel.dp_replicate > 1 and parallel.dp_shard not in (1, -1):
        yield "parallel.dp_replicate with dp_shard: one of them"
    if model.kv_heads % parallel.tp:
        yield f"parallel.tp {parallel.tp} does not divide model.attention.kv_heads {model.kv_heads}"
    if model.attention.kind == "mla":
        for name in ("query_rank", "kv_rank"):
            width = getattr(model.attention, name) or 0
            width += model.attention.rope_dim if name == "kv_rank" else 0
            if width % parallel.tp:
                yield f"parallel.tp {parallel.tp} does not divide model.attention.{name} (with rope_dim) {width}"
    if parallel.ep_kind not in ("auto", "all_to_all"):
        yield f"parallel.ep_kind {parallel.ep_kind}: all_to_all"
    if parallel.expert_placement is not None:
        yield "parallel.expert_placement"
    if parallel.overlap_micro_batches:
        yield "parallel.overlap_micro_batches"
    if parallel.tp_chunks > 1 or parallel.tp_kind not in ("auto", "chunked"):
        yield "parallel.tp_chunks or tp_kind: collectives of tp are its own"


def _rest(cfg: RunConfig) -> Iterator[str]:
    train, precision = cfg.train, cfg.precision
    if train.recompute not in ("none", "full"):
        yield f"train.recompute {train.recompute}: none or full"
    if train.offload or cfg.optim.offload:
        yield "train.offload or optim.offload"
    if train.compile == "on":
        yield "train.compile on"
    if precision.params != "fp32" or precision.optimizer != "fp32" or precision.reduce != "fp32" or precision.accumulate != "fp32":
        yield "precision.params, reduce, accumulate and optimizer are fp32"
