"""Small random models made by transformers, saved by transformers, for tests of import and export."""

from pathlib import Path

import torch

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
OWN = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 8},
    "deepseek_v3": EXPERTS | LATENT | GROUPS,
}
"""What a family's small shape has beside SHAPE."""


def make(family: str, changes: dict, *, seed: int = 0):
    """A transformers model of `family` with no weight at its usual start, so that a mix-up shows."""
    import transformers

    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    built = model(config(**SHAPE | OWN.get(family, {}) | changes)).eval()
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            if tensor.ndim == 1:
                tensor.add_((0.1 if name.endswith("correction_bias") else 0.3) * torch.randn_like(tensor))
    return built


def save(model, folder: Path, *, shard: str = "5GB") -> Path:
    """`model` as transformers writes it."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def ours(folder: Path):
    """(model section, model) read from a Hugging Face folder."""
    from llmtrain.convert.import_hf import load_into, model_config

    cfg = model_config(folder)
    model = empty(cfg)
    load_into(weights(model), folder, cfg)
    return cfg, model


def weights(model) -> dict[str, torch.Tensor]:
    """Parameters, and buffers such as the biases of routers, by canonical name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def empty(cfg):
    """The model of `cfg`, its weights NaN."""
    from llmtrain.model import build
    from llmtrain.ops import Call, resolve

    heads = {"head_dim": cfg.head_dim, "value_head_dim": cfg.value_head_dim, "heads": cfg.attention.heads, "kv_heads": cfg.kv_heads}
    widths = (cfg.hidden, cfg.ffn.hidden) if cfg.ffn.kind == "moe" else ()
    model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32, expert_widths=widths, **heads)), 64)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    return model


def tokens(*, rows: int = 2, length: int = 48, vocabulary: int = 97) -> torch.Tensor:
    """The same token ids at every call."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
