"""FLOPs per token in closed form against torch's own count of a forward and backward pass of the built model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import flops_per_token
from llmtrain.model import build, initialise
from llmtrain.ops import Call, Mask, resolve

ROWS, LENGTH = 2, 16
SHAPE = {"vocab_size": 61, "layers": 3, "hidden": 32, "attention": {"heads": 4, "kv_heads": 2}}
LATENT = {"kind": "mla", "heads": 4, "query_rank": 20, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
EXPERTS = {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 16}
SHARED = {"shared_experts": 2, "dense_layers": 1, "dense_hidden": 40}
CASES = {
    "dense": {},
    "latent": {"attention": LATENT},
    "latent, queries straight": {"attention": LATENT | {"query_rank": None}},
    "experts": {"ffn": EXPERTS},
    "experts, shared ones and a dense layer": {"ffn": EXPERTS | SHARED},
    "bigmac": {"ffn": EXPERTS | {"descend": 8, "activation": "gelu"}},
    "deepseek": {"attention": LATENT, "ffn": EXPERTS | SHARED, "mtp": {"heads": 2}},
}
PLAIN = {"attention": "reference", "grouped_mm": "loop", "cross_entropy": "reference"}
"""Ops whose products torch sees: attention over all keys, one product per expert."""


def counted(cfg: ModelConfig) -> float:
    """FLOPs per token of a forward and backward pass, as torch counts them."""
    torch.set_num_threads(1)
    call = Call(device="cpu", dtype=torch.float64, head_dim=cfg.head_dim, heads=cfg.attention.heads, kv_heads=cfg.kv_heads)
    model = build(cfg, resolve(PLAIN, call), None).double()
    initialise(model, cfg, 0)
    tokens = torch.randint(0, cfg.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ahead = [(tokens, tokens)] * cfg.mtp.heads
    with FlopCounterMode(display=False) as counter:
        out = model(tokens, mask=Mask(), targets=tokens, **({"ahead": ahead} if ahead else {}))
        (out["ce_sum"] + out.get("mtp_ce_sum", 0)).backward()
    return counter.get_total_flops() / (ROWS * LENGTH) - weighted_sums(cfg)


def weighted_sums(cfg: ModelConfig) -> int:
    """FLOPs per token of adding up its experts' results, forward and backward: a product to torch, which the closed form leaves out like
    all that is done element by element."""
    if cfg.ffn.kind != "moe":
        return 0
    return 6 * cfg.ffn.top_k * (cfg.ffn.descend or cfg.hidden) * (cfg.layers - cfg.ffn.dense_layers + cfg.mtp.heads)


@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_what_torch_counts(case):
    cfg = ModelConfig(**SHAPE | CASES[case])
    assert counted(cfg) == flops_per_token(cfg, LENGTH, causal=False)
