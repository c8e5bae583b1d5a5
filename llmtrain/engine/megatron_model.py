"""Our configuration as megatron-core's transformer configuration and layer specifications, and the stages of a rank built from them."""

from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch.nn import functional as F

from llmtrain.config.ffn import MoEConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.engine.megatron_modules import CoreAttention, LatentAttention, LatentExperts, Layer, Norm, Router, added
from llmtrain.engine.megatron_mtp import LookingAhead
from llmtrain.engine.megatron_shared import Shared
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan

gelu = partial(F.gelu, approximate="tanh")


def transformer_config(cfg: RunConfig, shape: MeshShape, plan: PipelinePlan | None, *, device: str) -> TransformerConfig:
    """megatron-core's configuration; what `megatron_check` lets pass, it can say."""
    model = cfg.model
    values = _sizes(model) | _mesh(shape, plan, device) | _plain(cfg)
    if model.ffn.kind == "moe":
        values |= _experts(model)
    if model.attention.kind != "mla":
        return TransformerConfig(**values)
    a = model.attention
    values |= {"q_lora_rank": a.query_rank, "kv_lora_rank": a.kv_rank, "qk_head_dim": a.nope_dim, "v_head_dim": a.value_dim}
    values |= {"qk_pos_emb_head_dim": a.rope_dim, "rope_type": "yarn", "rotary_scaling_factor": 1.0}
    return MLATransformerConfig(**values | {"multi_latent_attention": True})


def _sizes(model: ModelConfig) -> dict:
    a, dense = model.attention, model.of_block(0).ffn if model.ffn.kind == "dense" or model.ffn.dense_layers else model.ffn
    grouped = a.kind == "gqa"
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": a.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim if grouped else None,
        "ffn_hidden_size": dense.hidden,
        "normalization": "RMSNorm" if model.norm.kind == "rms_norm" else "LayerNorm",
        "layernorm_epsilon": model.norm.eps,
        "gated_linear_unit": model.ffn.activation == "swiglu",
        "activation_func": F.silu if model.ffn.activation == "swiglu" else gelu,
        "add_bias_linear": model.ffn.bias,
        "add_qkv_bias": grouped and a.qkv_bias,
        "qk_layernorm": not grouped or a.qk_norm,
    }


def _mesh(shape: MeshShape, plan: PipelinePlan | None, device: str) -> dict:
    values = {
        "tensor_model_parallel_size": shape.tp,
        "sequence_parallel": shape.tp > 1,
        "pipeline_model_parallel_size": shape.pp,
        "context_parallel_size": shape.cp,
        "expert_model_parallel_size": shape.ep,
        "expert_tensor_parallel_size": shape.etp,
    }
    if plan is not None:
        stages = [["decoder"] * blocks for blocks in plan.layers]
        stages[0], stages[-1] = ["embedding", *stages[0]], [*stages[-1], "loss"]
        values["pipeline_model_parallel_layout"] = stages
        values["virtual_pipeline_model_parallel_size"] = plan.virtual if plan.virtual > 1 else None
        # Gloo reads what it sends after the call, so that it must stay.
        values["deallocate_pipeline_outputs"] = device != "cpu"
        # Between two ranks that are each other's next and previous, messages in one batch would be taken for one another.
        values |= {"overlap_p2p_comm": plan.virtual > 1, "batch_p2p_comm": plan.virtual == 1}
    return values


def _plain(cfg: RunConfig) -> dict:
    """No dropout, no fusion, no weights drawn; gradients are sums, which the engine has scaled already."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision.compute]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "perform_initialization": False,
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    } | (full if cfg.train.recompute == "full" else {})


def _experts(model: ModelConfig) -> dict:
    ffn, router = model.ffn, model.ffn.router
    groups = {"moe_router_num_groups": router.groups, "moe_router_group_topk": router.top_groups}
    return {
        "num_moe_experts": ffn.experts,
        "moe_router_topk": ffn.top_k,
        "moe_ffn_hidden_size": ffn.hidden,
        "moe_layer_freq": [0] * ffn.dense_layers + [1] * (model.layers - ffn.dense_layers),
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "moe_router_load_balancing_type": _balancing(ffn),
        "moe_aux_loss_coeff": 0.0,  # the stages set it, and that of the other loss, before each step
        "moe_router_score_function": router.score,
        "moe_router_pre_softmax": router.score == "softmax" and not router.renormalise,
        "moe_router_topk_scaling_factor": router.scale if router.scale != 1.0 else None,
        "moe_router_enable_expert_bias": router.bias_rate is not None,
        "moe_router_bias_update_rate": router.bias_rate or 0.0,
        "moe_shared_expert_intermediate_size": ffn.shared_hidden or None,
    } | (groups if router.top_groups < router.groups else {})


def _balancing(ffn: MoEConfig) -> str:
    """megatron-core's loss over each row, or over each micro-batch."""
    return "none" if ffn.balance is None else "seq_aux_loss" if ffn.balance.sequences == 1 else "aux_loss"


def layer_spec(model: ModelConfig, config: TransformerConfig, shared: Shared) -> ModuleSpec:
    """A block of megatron-core's parallel projections, with our norms and our attention in it; `model` as `of_block` gives it."""
    core = ModuleSpec(module=CoreAttention, params={"shared": shared})
    submodules = TransformerLayerSubmodules(
        input_layernorm=ModuleSpec(module=Norm, params={"shared": shared}),
        self_attention=_latent(core, shared) if model.attention.kind == "mla" else _grouped(model, core, shared),
        self_attn_bda=added,
        mlp_bda=added,
        pre_mlp_layernorm=ModuleSpec(module=Norm, params={"shared": shared}),
        mlp=_moe(model, config) if model.ffn.kind == "moe" else ModuleSpec(module=MLP, submodules=_projections()),
    )
    return ModuleSpec(module=Layer, submodules=submodules, params={"shared": shared})


def _grouped(model: ModelConfig, core: ModuleSpec, shared: Shared) -> ModuleSpec:
    norm = ModuleSpec(module=Norm, params={"shared": shared}) if model.attention.qk_norm else IdentityOp
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=core, linear_proj=RowParallelLinear, q_layernorm=norm, k_layernorm=norm
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)


def _latent(core: ModuleSpec, shared: Shared) -> ModuleSpec:
    norm = ModuleSpec(module=Norm, params={"shared": shared})
    columns = ("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
    submodules = MLASelfAttentionSubmodules(
        **dict.fromkeys(columns, ColumnParallelLinear),
        core_attention=core,
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        kv_layernorm=norm,
    )
    return ModuleSpec(module=LatentAttention, params={"attn_mask_type": AttnMaskType.causal, "shared": shared}, submodules=submodules)


def _projections() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _moe(model: ModelConfig, config: TransformerConfig) -> ModuleSpec:
    experts = ModuleSpec(module=SequentialMLP, submodules=_projections())
    submodules = MoESubmodules(router=Router, experts=experts, shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_projections()))
    if model.ffn.descend is None:
        return ModuleSpec(module=MoELayer, submodules=submodules)
    return ModuleSpec(module=LatentExperts, submodules=submodules, params={"width": model.ffn.descend})


def build_stages(
    cfg: RunConfig, config: TransformerConfig, shared: Shared, *, shape: MeshShape, plan: PipelinePlan | None, place: int
) -> dict:
    """The models of the pipeline rank `place` by stage number, parameters left empty."""
    model, found = cfg.model, {}
    stages = [0] if plan is None else plan.stages_of(place)
    last = 0 if plan is None else plan.stages - 1
    for chunk, stage in enumerate(stages):
        blocks = range(model.layers) if plan is None else plan.blocks(stage)
        specs = [layer_spec(model.of_block(block), config, shared) for block in blocks]
        block = TransformerBlockSubmodules(layer_specs=specs, layer_norm=ModuleSpec(module=Norm, params={"shared": shared}))
        ahead = stage == last and model.mtp.heads > 0
        found[stage] = (LookingAhead if ahead else GPTModel)(
            config,
            block,
            vocab_size=-(-model.vocab_size // shape.tp) * shape.tp,
            max_sequence_length=model.max_seq_len,
            pre_process=stage == 0,
            post_process=stage == last,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="learned_absolute" if model.position.kind == "learned" else "none",
            vp_stage=chunk if len(stages) > 1 else None,
        )
        if ahead:
            found[stage].add_heads(layer_spec(model, config, shared), shared, model.mtp.heads)
        elif model.mtp.heads and stage == 0:
            found[stage].embedding.word_embeddings.weight.shared_embedding = True
    config.mtp_num_layers = model.mtp.heads or None  # told late: its own heads are not to be built
    return found
