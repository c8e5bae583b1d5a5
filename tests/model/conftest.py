"""Small models with every parameter away from its trivial value."""

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.model import build, initialise
from llmtrain.ops import Call, resolve

SMALL = {
    "vocab_size": 61,
    "layers": 3,
    "hidden": 32,
    "max_seq_len": 48,
    "attention": {"heads": 4, "kv_heads": 2},
    "ffn": {"hidden": 40},
    "init": {"std": 0.2},
}


@pytest.fixture
def make_model():
    """make_model({changes of the model section}, dtype=...) -> (cfg, model)."""
    torch.set_num_threads(1)

    def make(changes: dict | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 3):
        cfg = ModelConfig.model_validate(SMALL | (changes or {}))
        heads = {"head_dim": cfg.head_dim, "value_head_dim": cfg.value_head_dim, "heads": cfg.attention.heads, "kv_heads": cfg.kv_heads}
        widths = (cfg.hidden, cfg.ffn.hidden) if cfg.ffn.kind == "moe" else ()
        call = Call(device="cpu", dtype=dtype, documents=True, expert_widths=widths, **heads)
        with torch.device("meta"):
            model = build(cfg, resolve({}, call), 16)
        model = model.to(dtype).to_empty(device="cpu")
        initialise(model, cfg, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # gammas and biases away from 1 and 0, or a mix-up would not show
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        return cfg, model

    return make


@pytest.fixture
def tokens():
    return torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
