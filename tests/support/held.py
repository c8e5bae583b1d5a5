"""What a block keeps for its backward pass: bytes of the tensors that exist, whoever holds them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.compat import memory_of
from llmtrain.config.model import ModelConfig
from llmtrain.device.host_copies import HostCopies
from llmtrain.model import build, initialise
from llmtrain.ops import Call, Mask, resolve
from llmtrain.parallel.offload import apply_offload
from llmtrain.parallel.recompute import apply_recompute

PANGU = {
    "vocab_size": 61,
    "hidden": 256,
    "attention": {"kind": "mla", "heads": 4, "query_rank": 48, "kv_rank": 16, "nope_dim": 128, "rope_dim": 64, "value_dim": 128},
    "ffn": {"kind": "moe", "experts": 16, "top_k": 8, "hidden": 64, "shared_experts": 1},
    "norm": {"placement": "sandwich"},
}
"""About the proportions of Pangu Ultra MoE, a thirtieth as wide."""


class Held(TorchDispatchMode):
    """Sees the result of every operator. Views and results written in place count once, and what existed before not at all."""

    def __init__(self, *before: Tensor):
        super().__init__()
        self._aside = {memory_of(tensor) for tensor in before}
        self._made: dict[Any, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := memory_of(tensor)) not in self._aside:
                self._made[key] = tensor.untyped_storage().nbytes()
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Its memory does not count."""
        self._aside.add(memory_of(tensor))
        self._made.pop(memory_of(tensor), None)

    def bytes(self) -> int:
        """Of what there is now."""
        self._made = {key: size for key, size in self._made.items() if not key.expired()}
        return sum(self._made.values())


class Elsewhere(HostCopies):
    """Copies whose host memory does not count."""

    def __init__(self, held: Held):
        self.held = held

    def host_memory(self, like: Tensor) -> Tensor:
        memory = super().host_memory(like)
        self.held.leave_out(memory)
        return memory


def build_model(values: dict, *, dtype: torch.dtype, kernels: dict[str, str] | None = None, quick: bool = False) -> nn.Module:
    """A model of these values with the weights of seed 3, or with other ones that are sooner made."""
    torch.set_num_threads(1)
    cfg = ModelConfig.model_validate(values)
    call = Call(
        device="cpu",
        dtype=dtype,
        documents=True,
        head_dim=cfg.head_dim,
        value_head_dim=cfg.value_head_dim,
        heads=cfg.attention.heads,
        kv_heads=cfg.kv_heads,
        expert_widths=(cfg.hidden, cfg.ffn.hidden) if cfg.ffn.kind == "moe" else (),
    )
    with torch.device("meta"):
        model = build(cfg, resolve(kernels or {}, call), 16)
    model = model.to(dtype).to_empty(device="cpu")
    if quick:
        torch.manual_seed(3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    else:
        initialise(model, cfg, 3)
    return model


def kept(values: dict, *, recompute="none", offload=(), kernels: dict[str, str] | None = None, tokens: int = 64) -> float:
    """Bytes a token that one more block keeps in float32 when the forward pass is done, its input included."""
    totals = []
    for layers in (3, 4):
        model = build_model(values | {"layers": layers}, dtype=torch.float32, kernels=kernels, quick=True)
        x = torch.randn(1, tokens, model.cfg.hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
        rope = model.rotation(torch.arange(tokens)[None], x.dtype)
        held = Held(*model.parameters(), *rope, x)
        apply_recompute(model, recompute)
        apply_offload(model, offload, Elsewhere(held))
        with held:
            for block in model.blocks.values():
                x = block(x, rope=rope, mask=Mask())
            totals.append(held.bytes() - x.untyped_storage().nbytes())
    return (totals[1] - totals[0]) / tokens
