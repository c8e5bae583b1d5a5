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


def make(family: str, changes: dict, *, seed: int = 0):
    """A transformers model of `family` with no weight at its usual start, so that a mix-up shows."""
    import transformers

    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    built = model(config(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
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
    load_into(dict(model.named_parameters()), folder, cfg)
    return cfg, model


def empty(cfg):
    """The model of `cfg`, its weights NaN."""
    from llmtrain.model import build
    from llmtrain.ops import Call, resolve

    call = Call(device="cpu", dtype=torch.float32, head_dim=cfg.head_dim, heads=cfg.attention.heads, kv_heads=cfg.kv_heads)
    model = build(cfg, resolve({}, call), 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def tokens(*, rows: int = 2, length: int = 48, vocabulary: int = 97) -> torch.Tensor:
    """The same token ids at every call."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
