"""Modules that megatron-core is given in its layer specifications: our norms, our attention, and what stands around them.

Imports megatron-core, so it is imported when an engine is built. Shapes there are [S,B,..].
"""

import copy
from functools import partial

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.engine.megatron_shared import Shared
from llmtrain.model.rope import attention_factor

if not isinstance(multi_latent_attention.TELinear, type):
    multi_latent_attention.HAVE_TE = False  # it takes a wrapper that can be imported for Transformer Engine itself


class Norm(nn.Module):
    """The op rms_norm or layer_norm; under sequence parallelism its gradients are partial sums, which megatron-core then adds up."""

    def __init__(self, config, hidden_size: int, eps: float, *, shared: Shared, **_):
        super().__init__()
        self.ops, self.eps = shared.ops, eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.bias = nn.Parameter(torch.empty_like(self.weight)) if shared.cfg.norm.kind == "layer_norm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.ops.rms_norm(x, self.weight, self.eps) if self.bias is None else self.ops.layer_norm(x, self.weight, self.bias, self.eps)
        )


class CoreAttention(nn.Module):
    """Our attention op on heads [S,B,H,d] in the place of megatron-core's; RoPE is applied here, but that of latent attention before."""

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type, *, shared: Shared, **_):
        super().__init__()
        self.shared = shared
        a = shared.cfg.attention
        scale = a.softmax_scale if a.kind == "mla" else None
        self.query_factor = None if scale is None else scale * shared.cfg.head_dim**0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *_, **__) -> Tensor:
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
        shared = self.shared
        rope = shared.cos_sin() if shared.cfg.attention.kind == "gqa" else None
        if rope is not None:
            q, k = shared.ops.rope(q, *rope), shared.ops.rope(k, *rope)
        q = q if self.query_factor is None else q * self.query_factor
        return shared.attend(q, k, v).permute(2, 0, 1, 3).flatten(2)


class Whole(nn.Module):
    """A projection that every rank of tensor parallelism holds whole and applies to its own part of the sequence."""

    def __init__(self, config, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class _Angles(nn.Module):
    """Our RoPE in the place of megatron-core's: angles [S,B,1,d] at the micro-batch's own positions, and what cos and sin are times."""

    def __init__(self, shared: Shared):
        super().__init__()
        self.shared = shared

    def get_rotary_seq_len(self, *_) -> int:
        return 0

    def forward(self, *_, **__) -> tuple[Tensor, float]:
        rope = self.shared.rope
        positions = self.shared.micros[self.shared.current].positions
        angles = rope.angles(positions, torch.float32)  # [B,S,d/2]
        return torch.cat((angles, angles), -1).transpose(0, 1)[:, :, None], attention_factor(rope.scaling)


class LatentAttention(MLASelfAttention):
    """megatron-core's, with whole narrow projections.

    Without Transformer Engine it cuts them by columns and gathers what they give, and the gradient of the rotated key, which each rank has
    for its own heads alone, is cut again without a sum (docs/megatron.md). Whole ones work on a part of the sequence, and sums are right.
    """

    def __init__(self, config, submodules, layer_number: int, *, shared: Shared, **options):
        super().__init__(config, submodules, layer_number, **options)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = Whole(config, config.hidden_size, config.q_lora_rank)
        self.linear_kv_down_proj = Whole(config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim)
        self.rotary_pos_emb = _Angles(shared)


class Router(TopKRouter):
    """megatron-core's, with logits in fp32 whatever the rest computes in; its own product asks for a name that only Transformer Engine
    brings.

    `counts` [E], the choices of each expert, and `losses`, what balancing has added, are those of forward passes that are differentiated,
    of which each is made once, with recomputation too.
    """

    counts: Tensor | None = None
    losses: Tensor | float = 0.0

    def _apply(self, fn, recurse=True):
        # In 16 bits biases and what they are moved by would be rounded; and the engine holds the tensor of the biases.
        kept = {name: getattr(self, name) for name in ("expert_bias", "local_tokens_per_expert")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None and getattr(self, name).dtype.itemsize < 4:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def gating(self, input: Tensor) -> Tensor:
        """[S,B,D] -> [S,B,E]."""
        self._maintain_float32_expert_bias()
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, *given, **options) -> tuple[Tensor, Tensor]:
        """As TopKRouter.routing, looked at."""
        probs, chosen = super().routing(logits, *given, **options)
        if self.training and torch.is_grad_enabled():
            found = chosen.sum(0)
            self.counts = found if self.counts is None else self.counts + found
            if self.config.moe_z_loss_coeff:
                weight = self.config.moe_z_loss_coeff / self.tp_cp_group.size()
                self.losses = self.losses + weight * logits.detach().logsumexp(-1).square().sum()
        return probs, chosen

    def attach_and_log_load_balancing_loss(self, activation: Tensor, coefficient: float, loss: Tensor, *given, **options) -> Tensor:
        """As TopKRouter's, which multiplies the loss by the number of tokens that it is told."""
        tokens = options.get("valid_token_count")
        self.losses = self.losses + loss.detach() * (activation.shape[0] if tokens is None else tokens)
        return super().attach_and_log_load_balancing_loss(activation, coefficient, loss, *given, **options)


class LatentExperts(MoELayer):
    """Rows go to the experts through a narrow projection, and back through another one (BigMac); megatron-core has that with Transformer
    Engine alone."""

    def __init__(self, config, submodules=None, layer_number=None, pg_collection=None, *, width: int):
        super().__init__(config, submodules, layer_number, pg_collection)
        self.config = replace_width(config, width)
        self.fc1_latent_proj = Whole(config, config.hidden_size, width)
        self.fc2_latent_proj = Whole(config, width, config.hidden_size)
        self.experts = build_module(
            self.submodules.experts, self.num_local_experts, self.config, pg_collection=pg_collection or get_default_pg_collection()
        )


def replace_width(config, width: int):
    """`config` with experts of this width outside; a copy, since checking it again would ask for Transformer Engine."""
    narrow = copy.copy(config)
    narrow.moe_latent_size = width
    return narrow


class Layer(TransformerLayer):
    """A block that is told its micro-batch, with norms after its branches if the model has them."""

    def __init__(self, config, submodules, *args, shared: Shared, **options):
        super().__init__(config, submodules, *args, **options)
        self.shared = shared
        self.post_attention_norm = self.post_ffn_norm = None
        if shared.cfg.norm.placement != "pre":
            size = config.hidden_size
            self.post_attention_norm = Norm(config, size, config.layernorm_epsilon, shared=shared)
            self.post_ffn_norm = Norm(config, size, config.layernorm_epsilon, shared=shared)
        self.self_attn_bda = partial(added, norm=self.post_attention_norm)
        self.mlp_bda = partial(added, norm=self.post_ffn_norm)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, *args, **options):
        """As TransformerLayer.forward; `attention_mask` is the number of the micro-batch."""
        self.shared.at(attention_mask)
        return super().forward(hidden_states, attention_mask, *args, **options)


def added(training: bool, fused: bool, *, norm: Norm | None = None):
    """What adds a branch to the residual stream, as megatron-core asks for it: `norm` stands on the branch before that."""
    return partial(_added, norm)


def _added(norm: Norm | None, branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    out, bias = branch
    out = out if bias is None else out + bias
    return residual + (out if norm is None else norm(out))
