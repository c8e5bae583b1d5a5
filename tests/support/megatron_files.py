"""Checkpoints as Megatron-LM writes them, made of canonical weights."""

from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from llmtrain.config.model import ModelConfig
from llmtrain.convert.megatron_map import PADDED, entries, to_megatron
from llmtrain.model import family
from llmtrain.ops import Call, resolve


def random_weights(cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Canonical weights of a model, all different."""
    model = family.build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32)), 16)
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    if cfg.tie_embeddings:
        names.pop("head.weight", None)
    torch.manual_seed(5)
    return {name: torch.randn(tensor.shape) for name, tensor in names.items()}


def arguments(cfg: ModelConfig, **more) -> Namespace:
    """What Megatron keeps of its command line for this model."""
    a, ffn = cfg.attention, cfg.ffn
    values = {
        "num_layers": cfg.layers,
        "hidden_size": cfg.hidden,
        "num_attention_heads": a.heads,
        "padded_vocab_size": -(-cfg.vocab_size // 8) * 8,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_seq_len,
        "normalization": "RMSNorm",
        "norm_epsilon": cfg.norm.eps,
        "swiglu": ffn.activation == "swiglu",
        "add_bias_linear": ffn.bias,
        "ffn_hidden_size": ffn.hidden,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "untie_embeddings_and_output_weights": not cfg.tie_embeddings,
        "attention_dropout": 0.1,
        "qk_layernorm": a.kind == "mla" or a.qk_norm,
    }
    if a.kind == "mla":
        values |= {"multi_latent_attention": True, "q_lora_rank": a.query_rank, "kv_lora_rank": a.kv_rank, "qk_head_dim": a.nope_dim}
        values |= {"qk_pos_emb_head_dim": a.rope_dim, "v_head_dim": a.value_dim, "rope_type": "rope"}
    else:
        values |= {"group_query_attention": cfg.kv_heads < a.heads, "num_query_groups": cfg.kv_heads, "kv_channels": cfg.head_dim}
    if ffn.kind == "moe":
        values |= {"num_experts": ffn.experts, "moe_router_topk": ffn.top_k, "moe_ffn_hidden_size": ffn.hidden}
        values |= {"moe_shared_expert_intermediate_size": ffn.shared_hidden or None}
    return Namespace(**values | more)


def write_ranks(
    folder: Path, cfg: ModelConfig, weights: dict, *, tp: int = 1, pp: int = 1, virtual: int = 1, ep: int = 1, te: bool = False
):
    """One file a rank, as with `--ckpt-format torch`; `te` gives the names of Transformer Engine."""
    iteration = folder / "iter_0000100"
    args = arguments(cfg, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep, tensor_model_parallel_size=tp)
    whole = to_megatron(cfg, weights, multiple=8)
    for t in range(tp):
        for p in range(pp):
            for e in range(ep):
                name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (pp > 1) + f"_{e:03d}" * (ep > 1)
                models = [_rank_model(cfg, whole, t, tp, stage=c * pp + p, stages=virtual * pp, e=e, ep=ep, te=te) for c in range(virtual)]
                state = {"args": args, "iteration": 100, "checkpoint_version": 3.0}
                state |= {"model": models[0]} if virtual == 1 else {f"model{c}": model for c, model in enumerate(models)}
                (iteration / name).mkdir(parents=True)
                torch.save(state, iteration / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def _rank_model(cfg, whole, t: int, tp: int, *, stage: int, stages: int, e: int, ep: int, te: bool) -> dict[str, torch.Tensor]:
    each, found = cfg.layers // stages, {}
    for entry in entries(cfg):
        name = entry.name
        first, last = stage == 0, stage == stages - 1
        if name.startswith("decoder.layers."):
            layer = int(name.split(".")[2])
            if layer // each != stage:
                continue
            name = name.replace(f"layers.{layer}.", f"layers.{layer % each}.", 1)
        elif not (first if name.startswith("embedding") else last):
            continue
        if ".local_experts." in name:
            expert, count = int(name.split("local_experts.")[1].split(".")[0]), cfg.ffn.experts // ep
            if expert // count != e:
                continue
            name = name.replace(f"local_experts.{expert}.", f"local_experts.{expert % count}.")
        found[_te_name(name, cfg) if te else name] = _rank_part(entry, whole[entry.name], t, tp)
    return found | {"decoder.layers.0.mlp._extra_state": None}


def _rank_part(entry, tensor: torch.Tensor, t: int, tp: int) -> torch.Tensor:
    if entry.name in PADDED:
        return tensor.chunk(tp)[t].clone()
    parts = [part if p.dim is None else part.chunk(tp, p.dim)[t] for p, part in zip(entry.parts, entry.split(tensor))]
    return entry.join(parts).clone()


def _te_name(name: str, cfg: ModelConfig) -> str:
    experts = name.replace(".local_experts.", ".")
    if experts != name:
        head, _, rest = experts.partition(".experts.")
        expert, matrix, kind = rest.split(".")
        return f"{head}.experts.{matrix}.{kind}{expert}"
    fused = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"} if cfg.attention.kind == "gqa" else {}
    fused |= {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"} if cfg.ffn.kind == "dense" else {}
    fused |= {f"self_attention.{kind}_layernorm.weight": f"self_attention.linear_{kind}_up_proj.layer_norm_weight" for kind in ("q", "kv")}
    for apart, together in fused.items() if cfg.attention.kind == "mla" or "q_layernorm" not in name else ():
        name = name.replace(apart, together)
    return name


def write_distributed(folder: Path, cfg: ModelConfig, weights: dict) -> None:
    """megatron-core's torch_dist: layers, and their experts, stacked."""
    folder.mkdir(parents=True)
    stacks: dict[str, list] = {}
    state = {}
    for name, tensor in to_megatron(cfg, weights, multiple=8).items():
        if not name.startswith("decoder.layers."):
            state[name] = tensor
            continue
        key = "decoder.layers." + name.split(".", 3)[3]
        if ".local_experts." in key:
            head, _, rest = key.partition(".local_experts.")
            key = f"{head}.experts.{rest.split('.', 1)[1]}"
        stacks.setdefault(key, []).append(tensor)
    for key, tensors in stacks.items():
        stack = torch.stack(tensors)
        state[key] = stack.unflatten(0, (cfg.layers, -1)) if ".experts.experts." in key else stack
    dcp.save(state | {"optimizer.state.exp_avg.output_layer.weight": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)
    torch.save({"args": arguments(cfg), "iteration": 7}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
