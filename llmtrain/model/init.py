"""Initial weights, the same whatever the mesh."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.config.model import ModelConfig
from llmtrain.convert.adapters import A, is_adapter
from llmtrain.convert.placed import held
from llmtrain.model.draw import normals

_RESIDUAL_OUTPUTS = ("out_proj.weight", "down_proj.weight", "experts.down_proj", "ascend_proj.weight")
_NARROWING = ("q_down_proj.weight", "kv_down_proj.weight")
_EMBEDDINGS = ("embedding.weight", "position_embedding.weight")
_DRAW = 1 << 20  # elements drawn at once, to bound memory


def canonical_name(name: str) -> str:
    """A parameter's name without the parts that activation-checkpoint and compile wrappers add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def matrix_std(cfg: ModelConfig, name: str) -> float:
    """Standard deviation of the matrix of this canonical name at the start (Pangu Ultra, arXiv 2504.07866, section on TinyInit).

    normal: init.std, residual outputs init.std / sqrt(2 L). small: sqrt(2 / (5 d)), residual outputs sqrt(2 / (5 d L)).
    tiny: sqrt(1 / (2 d L)). Embeddings: init.embedding_std, else 0.5 for tiny and the kind's general value otherwise.
    """
    init, depth, width = cfg.init, cfg.layers, cfg.hidden
    if name in _EMBEDDINGS and init.embedding_std is not None:
        return init.embedding_std
    if init.kind == "tiny":
        return 0.5 if name in _EMBEDDINGS else math.sqrt(1 / (2 * width * depth))
    general, scale = (init.std, 2 * depth) if init.kind == "normal" else (math.sqrt(2 / (5 * width)), depth)
    return general / math.sqrt(scale) if _leaves_a_branch(cfg, name) else general


def _leaves_a_branch(cfg: ModelConfig, name: str) -> bool:
    """Whether what the matrix gives is added to the residual stream, with nothing but norms in between."""
    if name.endswith(_NARROWING) or (name.endswith("experts.down_proj") and cfg.ffn.kind == "moe" and cfg.ffn.descend):
        return False
    return name.endswith(_RESIDUAL_OUTPUTS)


def post_norm_gamma(cfg: ModelConfig, branch: str) -> float:
    """Initial gamma of the norm after `branch` (attention or ffn): 1, or c / sqrt(L) if depth-scaled (Pangu Ultra, eq. 1).

    c `auto` counts as 1 until set_post_norm_gamma is called with the measured value.
    """
    if cfg.norm.placement != "depth_scaled_sandwich":
        return 1.0
    c = cfg.norm.c_attention if branch == "attention" else cfg.norm.c_ffn
    return (1.0 if c == "auto" else c) / math.sqrt(cfg.layers)


@torch.no_grad()
def initialise(model: nn.Module, cfg: ModelConfig, seed: int, *, adapters_only: bool = False) -> None:
    """Fill every parameter (plain or DTensor) from (seed, canonical name, element index).

    Each rank draws only the elements that it holds, on the CPU. Biases, and buffers, are 0, norm gammas 1, depth-scaled post norms
    c / sqrt(L); a family's own `initial(name)` comes first. Adapters begin at A of std 1 / sqrt(3 inputs), the one of PEFT's uniform
    numbers, and B 0, so that they add nothing; with `adapters_only` nothing else is filled. Raises ValueError for a parameter on meta.
    """
    for raw_name, param in model.named_parameters():
        name = canonical_name(raw_name)
        if param.is_meta:
            raise ValueError(f"{name} is on the meta device; call model.to_empty(device=...) before initialise")
        if is_adapter(name):
            _fill_normal(param, seed, name, 1 / math.sqrt(3 * param.shape[1]) if name.endswith(A) else 0.0)
            continue
        if adapters_only:
            continue
        own = model.initial(name) if hasattr(model, "initial") else None
        if param.ndim > 1 and not name.endswith("_bias"):
            _fill_normal(param, seed, name, matrix_std(cfg, name) if own is None else own)
        else:
            _local(param).fill_(_vector_value(cfg, name) if own is None else own)
    for buffer in () if adapters_only else model.buffers():  # biases of routers
        buffer.zero_()


def _vector_value(cfg: ModelConfig, name: str) -> float:
    if name.endswith("bias"):
        return 0.0
    if name.endswith(("post_attention_norm.weight", "post_ffn_norm.weight")):
        return post_norm_gamma(cfg, "attention" if "post_attention" in name else "ffn")
    return 1.0


def _fill_normal(param: Tensor, seed: int, name: str, std: float) -> None:
    local = _local(param)
    if local.numel() == 0:
        return
    # All dims but the last are rows, so that only those held are drawn of a stack of matrices that is sharded in its middle.
    *lead, columns = held(param)
    rows, width = _flat_rows(lead, param.shape[:-1]), param.shape[-1]
    local = local.view(len(rows), len(columns))
    whole = len(columns) == width
    step = max(1, _DRAW // width)
    for at in range(0, len(rows), step):
        drawn = torch.cat([_rows(seed, name, first, last, width) for first, last in _runs(rows[at : at + step])])
        local[at : at + step].copy_((drawn if whole else drawn[:, columns]) * std)


def _flat_rows(lead: list[list[int] | range], shape: Sequence[int]) -> Sequence[int]:
    """Rows of a tensor of leading dims `shape`, flattened, that hold the indices `lead` of each of these dims; sorted."""
    flat: Sequence[int] = lead[0]
    for indices, size in zip(lead[1:], shape[1:]):
        flat = [row * size + index for row in flat for index in indices]
    return flat


def _rows(seed: int, name: str, first: int, last: int, width: int) -> Tensor:
    return torch.from_numpy(normals(seed, name, first * width, last * width)).view(-1, width)


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted indices as half-open ranges: [3, 4, 5, 8] -> [(3, 6), (8, 9)]."""
    breaks = [0, *(i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices)]
    return [(indices[a], indices[b - 1] + 1) for a, b in pairwise(breaks)]


def _local(param: Tensor) -> Tensor:
    return param.to_local() if isinstance(param, DTensor) else param


def measure_branch_std(model: nn.Module, run: Callable[[], object]) -> tuple[float, float]:
    """Mean over layers of the std of the (attention, ffn) branch before its post norm, over the tokens that `run` forwards.

    `run` does one forward pass of `model`; on several ranks give all of them the same tokens. Defines Pangu Ultra's c_attn, c_mlp.
    """
    return branch_std(branch_moments([model], run))


def branch_moments(models: Iterable[nn.Module], run: Callable[[], object], *, real: Tensor | None = None) -> Tensor:
    """Sum, sum of squares and count of every branch's output before its post norm: [L,2,3] fp64, zeros for blocks held elsewhere.

    `models` are the whole model or stages of a pipeline, which `run` forwards once. `real` [B,S] leaves out positions that are padding.
    Moments of parts of a sequence, or of stages, add up; `branch_std` makes a std of each layer of the sum.
    """
    models = list(models)
    for model in models:
        _require_post_norms(model)
    parameter = next(models[0].parameters())
    found = torch.zeros(models[0].cfg.layers, 2, 3, dtype=torch.float64, device=parameter.device)

    def add(layer: int, branch: int, out: Tensor) -> None:
        rows = out.double() if real is None else out[real].double()
        found[layer, branch] += torch.stack([rows.sum(), rows.square().sum(), torch.full_like(found[0, 0, 0], rows.numel())])

    hooks = [
        getattr(block, f"post_{branch}_norm").register_forward_pre_hook(lambda _m, args, at=(int(name), i): add(*at, args[0]))
        for model in models
        for name, block in model.blocks.items()
        for i, branch in enumerate(("attention", "ffn"))
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def branch_std(moments: Tensor) -> tuple[float, float]:
    """Mean over layers of the std of the (attention, ffn) branch, from the moments [L,2,3] of all layers."""
    total, squares, count = moments.unbind(-1)
    if not count.all():
        raise ValueError("run() did not forward the model, so no branch was measured")
    std = ((squares - total.square() / count) / (count - 1)).sqrt()  # [L,2]
    attention, ffn = std.mean(0).tolist()
    return attention, ffn


@torch.no_grad()
def set_post_norm_gamma(model: nn.Module, c_attention: float, c_ffn: float) -> None:
    """Set every post-norm gamma to c / sqrt(L), L being the layers of the whole model; raises ValueError if it has no post norms."""
    _require_post_norms(model)
    root = math.sqrt(model.cfg.layers)  # a pipeline stage holds fewer
    for block in (*model.blocks.values(), *(head.block for head in getattr(model, "mtp", None) or ())):
        _local(block.post_attention_norm.weight).fill_(c_attention / root)
        _local(block.post_ffn_norm.weight).fill_(c_ffn / root)


def _require_post_norms(model: nn.Module) -> None:
    if any(block.post_attention_norm is None for block in model.blocks.values()):
        raise ValueError("the model has no post norms; c: auto needs model.norm.placement depth_scaled_sandwich")
