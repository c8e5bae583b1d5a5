"""Gradients of megatron-core's own latent attention under tensor parallelism: for ranks of worlds, whose torch it changes.

Its own layers without Transformer Engine in a model of one block. Two modules are put in, as it has none that would do: attention with keys
and values of different widths, and a norm that takes part in sequence parallelism.
"""

import importlib
import zlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, LENGTH, ROWS = 64, 16, 2
ROTATED = 4
"""Width of the rotated key."""


class Attention(nn.Module):
    """Causal attention of heads [S,B,H,d]."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__()
        self.scale, self.deaf = softmax_scale, 0
        """The first heads, which give the rotated key no gradient."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        if self.deaf:
            through = key.new_ones(key.shape[2:], dtype=torch.bool)
            through[: self.deaf, -ROTATED:] = False
            key = key.where(through, key.detach())
        heads = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=True, scale=self.scale).permute(2, 0, 1, 3).flatten(2)


class Norm(nn.RMSNorm):
    """Its gradient is marked as a part of the sum under sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def spec_of(*, ours: bool):
    """megatron-core's block with latent attention; or with the engine's in its place."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from llmtrain.engine.megatron_modules import LatentAttention

    spec = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm")
    block, attention = spec.submodules, spec.submodules.self_attention
    attention.submodules.core_attention = Attention
    block.input_layernorm = block.pre_mlp_layernorm = attention.submodules.q_layernorm = attention.submodules.kv_layernorm = Norm
    if ours:
        attention.module, attention.params = LatentAttention, attention.params | {"shared": None}
    return spec


def built(*, sequence_parallel: bool = False, ours: bool = False, deaf: int = 0) -> nn.Module:
    """A model of one block whose weights, each drawn by its name, are cut over the world; `deaf` as Attention has it."""
    import megatron_names
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    ranks = dist.get_world_size()
    values = megatron_names.SIZES | megatron_names.PLAIN | megatron_names.MODELS["latent"]
    values |= {"num_layers": 1, "gated_linear_unit": False, "activation_func": F.gelu, "hidden_dropout": 0.0}
    mesh = {"tensor_model_parallel_size": ranks, "sequence_parallel": sequence_parallel and ranks > 1}
    config = MLATransformerConfig(**values | mesh)
    block = TransformerBlockSubmodules(layer_specs=[spec_of(ours=ours)], layer_norm=Norm)
    model = GPTModel(config, block, VOCAB, LENGTH, position_embedding_type="rope", share_embeddings_and_output_weights=False)
    model.decoder.layers[0].self_attention.core_attention.deaf = deaf
    if ours:  # it would ask the engine for the angles
        model.decoder.layers[0].self_attention.rotary_pos_emb = RotaryEmbedding(config.qk_pos_emb_head_dim, config.rotary_percent)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape, dim = list(parameter.shape), cut(parameter)
            if dim is not None:
                shape[dim] *= ranks
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            drawn = 1.0 + 0.1 * drawn if drawn.dim() == 1 else 0.2 * drawn
            parameter.copy_(drawn if dim is None else drawn.chunk(ranks, dim)[dist.get_rank()])
    return model


def cut(parameter: Tensor) -> int | None:
    """The dimension along which ranks have parts of it."""
    whole = not getattr(parameter, "tensor_model_parallel", False) or dist.get_world_size() == 1
    return None if whole else parameter.partition_dim


def gradients(cases: dict[str, dict]) -> dict[str, dict]:
    """Whole gradients of one step by case and by megatron-core's names, in each rank's view of what no rank has alone."""
    importlib.import_module("megatron_cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(2))
    found = {}
    for name, options in cases.items():
        model = built(**options)
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        positions = torch.arange(LENGTH).expand_as(tokens)
        wrapped(tokens, positions, None, labels=labels).sum().backward()
        finalize_model_grads([wrapped])
        found[name] = {key: whole(parameter).double().numpy() for key, parameter in model.named_parameters()}
    return found


def whole(parameter: Tensor) -> Tensor:
    """The parameter's gradient, put together from the ranks' parts."""
    parts = [torch.empty_like(parameter.main_grad) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, parameter.main_grad.contiguous())
    dim = cut(parameter)
    return parts[0] if dim is None else torch.cat(parts, dim)
