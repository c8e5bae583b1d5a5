"""Latent attention and the mixture of experts, each alone, against transformers' DeepSeek-V3."""

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.model.mla import LatentAttention
from llmtrain.model.moe import MoE
from llmtrain.model.rope import Rope
from llmtrain.ops import Call, Mask, resolve

deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3", reason="the comparison is with transformers")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, "mscale": 1.0}
ATTENTION = {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6, "norm_eps": 1e-6}
ROUTER = {"score": "sigmoid", "scale": 2.5, "groups": 4, "top_groups": 2, "bias_rate": 0}
EXPERTS = {"kind": "moe", "experts": 8, "top_k": 3, "hidden": 24, "shared_experts": 1, "router": ROUTER}


def config(changes: dict):
    """transformers' configuration; rotated pairs stand as here, half a head apart, so that weights are the same on both sides."""
    made = deepseek.DeepseekV3Config(**SHAPE | {"rope_interleave": False} | changes)
    made._attn_implementation = "sdpa"
    return made


def ours(kind: type, dtype: torch.dtype, **model):
    cfg = ModelConfig.model_validate({"vocab_size": 97, "layers": 2, "hidden": 32, "position": {"kind": "rope"}, **model})
    ops = resolve({}, Call(device="cpu", dtype=dtype, head_dim=12, value_head_dim=6, heads=4, kv_heads=4, expert_widths=(32, 24)))
    return cfg, kind(cfg, ops=ops).to(dtype)


NAMES = {
    "q_a_proj": "q_down_proj",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up_proj",
    "q_proj": "q_up_proj",
    "kv_a_proj_with_mqa": "kv_down_proj",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up_proj",
    "o_proj": "out_proj",
}


def exact_norm(self, x):
    """transformers' norm without its detour over float32."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("rank", [12, None])
def test_attention(rank, stretched, monkeypatch):
    monkeypatch.setattr(deepseek.DeepseekV3RMSNorm, "forward", exact_norm)
    torch.manual_seed(0)
    rope = {"rope_parameters": YARN | {"mscale_all_dim": 0.7}} if stretched else {}
    theirs = deepseek.DeepseekV3Attention(config({"q_lora_rank": rank} | rope), layer_idx=0).double()
    own = ATTENTION | {"query_rank": rank} | ({"softmax_scale": theirs.scaling} if stretched else {})
    assert (theirs.scaling == 12**-0.5) == (not stretched)
    cfg, mine = ours(LatentAttention, torch.float64, attention=own)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        mine.load_state_dict({f"{NAMES[n.removesuffix('.weight')]}.weight": p for n, p in theirs.state_dict().items()})
        x, positions = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9)[None] + 3
        cos, sin = Rope(cfg.position, cfg.rope_dim)(positions, torch.float64)
        causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        expected, _ = theirs(x, position_embeddings=(cos[:, 0], sin[:, 0]), attention_mask=causal)
        torch.testing.assert_close(mine(x, rope=(cos, sin), mask=Mask()), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "theirs, router, shared",
    [
        ({}, {}, 1),
        ({"norm_topk_prob": False, "n_shared_experts": 2}, {"renormalise": False}, 2),
        ({"n_group": 1, "topk_group": 1}, {"groups": 1, "top_groups": 1}, 1),
    ],
    ids=["groups", "as they are", "one group"],
)
def test_experts(theirs, router, shared):
    """In float32, in which transformers computes the router whatever it is given."""
    torch.manual_seed(0)
    theirs = deepseek.DeepseekV3MoE(config(theirs))
    _, mine = ours(MoE, torch.float32, ffn=EXPERTS | {"router": ROUTER | router, "shared_experts": shared})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        theirs.gate.e_score_correction_bias.copy_(0.2 * torch.randn(8))
        gate, up = theirs.experts.gate_up_proj.transpose(1, 2).chunk(2, dim=2)
        stacks = {"gate_proj": gate, "up_proj": up, "down_proj": theirs.experts.down_proj.transpose(1, 2)}
        state = {f"experts.{name}": stack for name, stack in stacks.items()}
        state |= {f"shared.{name}": tensor for name, tensor in theirs.shared_experts.state_dict().items()}
        mine.load_state_dict(state | {"router.weight": theirs.gate.weight, "router.bias": theirs.gate.e_score_correction_bias})
        x = torch.randn(2, 50, 32)
        _, weights, ids = theirs.gate(x)
        choice = mine.router(x.flatten(0, 1))
        order = ids.argsort(-1), choice.ids.argsort(-1)
        assert torch.equal(ids.gather(1, order[0]), choice.ids.gather(1, order[1]))
        torch.testing.assert_close(choice.probs.gather(1, order[1]), weights.gather(1, order[0]), atol=1e-7, rtol=1e-6)
        plain = choice.scores.topk(3).indices.sort(-1).values
        assert not torch.equal(plain, choice.ids.sort(-1).values), "the bias, or the groups, must matter for the test to mean something"
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-5, rtol=1e-5)
