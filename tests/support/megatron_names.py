"""Names and shapes of the parameters that megatron-core itself builds, as JSON: `python megatron_names.py` in a process of its own.

Its own layers without Transformer Engine, its own norms and attention: nothing of the engine is in the way.
"""

import inspect
import json
import os
import sys

import megatron_cpu  # noqa: F401
import torch
import torch.distributed as dist
from torch.nn import functional as F

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
PLAIN = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False, "normalization": "RMSNorm"}
PLAIN |= {"use_cpu_initialization": True, "bias_activation_fusion": False, "persist_layer_norm": False}
MODELS = {
    "dense": {"num_query_groups": 2, "qk_layernorm": True},
    "biases": {
        "num_query_groups": 2,
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "activation_func": F.gelu,
        "normalization": "LayerNorm",
    },
    "latent": {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6, "rope_type": "rope"},
    "experts": {"num_query_groups": 2, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1]},
}
MODELS["latent"] |= {"multi_latent_attention": True, "qk_layernorm": True, "num_query_groups": 4}
MODELS["experts"] |= {
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}


def named(model: dict) -> dict[str, list[int]]:
    """Parameters, and biases of routers, of one model."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        multi_latent_attention.HAVE_TE = False
        for name in ("TELinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear"):
            setattr(multi_latent_attention, name, type(name, (), {}))
    latent = model.get("multi_latent_attention", False)
    config = (MLATransformerConfig if latent else TransformerConfig)(**SIZES | PLAIN | model)
    if "num_moe_experts" in model:
        make, given = (
            gpt_layer_specs.get_gpt_decoder_block_spec,
            {"config": config, "use_transformer_engine": False, "normalization": "RMSNorm"},
        )
    else:
        make = gpt_layer_specs.get_gpt_layer_local_spec
        given = {"qk_layernorm": config.qk_layernorm, "multi_latent_attention": latent, "normalization": config.normalization}
    spec = make(**{name: value for name, value in given.items() if name in inspect.signature(make).parameters})
    for layer in getattr(spec, "layer_specs", None) or [spec]:  # which has no parameters, and none for latent attention
        layer.submodules.self_attention.submodules.core_attention = IdentityOp
    built = GPTModel(config, spec, 64, 32, position_embedding_type="rope", share_embeddings_and_output_weights=False)
    tensors = [*built.named_parameters(), *(item for item in built.named_buffers() if item[0].endswith("expert_bias"))]
    return {name: list(tensor.shape) for name, tensor in tensors}


def main() -> None:
    """Print what each model has, and the reason where one cannot be built."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.set_num_threads(1)
    found = {name: named(model) for name, model in MODELS.items()}
    json.dump({"version": megatron.core.__version__, "models": found}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
