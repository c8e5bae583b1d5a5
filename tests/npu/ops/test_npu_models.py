"""Whole models on the stand-in with the fused operators, against the CPU in float64: which operators a step calls, loss and gradients."""

import pytest
import stand_in

stand_in.start()

import torch  # noqa: E402

from llmtrain.config.model import ModelConfig  # noqa: E402
from llmtrain.model import build, initialise  # noqa: E402
from llmtrain.model.cache import KVCache  # noqa: E402
from llmtrain.ops import Call, Mask, resolve  # noqa: E402

SHAPE = {"vocab_size": 61, "layers": 2, "hidden": 32, "max_seq_len": 48, "attention": {"heads": 4, "kv_heads": 2}, "init": {"std": 0.2}}
MODELS = {
    "dense": {"ffn": {"hidden": 40}},
    "sandwich": {"ffn": {"hidden": 40}, "norm": {"placement": "sandwich"}, "attention": {"heads": 4, "kv_heads": 2, "qk_norm": True}},
    "experts": {"ffn": {"kind": "moe", "experts": 6, "top_k": 2, "hidden": 24}},
    "latent": {
        "attention": {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6},
        "ffn": {
            "kind": "moe",
            "experts": 8,
            "top_k": 2,
            "hidden": 24,
            "shared_experts": 1,
            "router": {"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "bias_rate": 0.01},
        },
    },
}
DENSE = {"npu_fusion_attention", "npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_cross_entropy_loss"}
EXPERTS = {"npu_grouped_matmul", "npu_moe_token_permute", "_npu_moe_token_unpermute"}
WITH_EXPERTS = ("experts", "latent")
DOCUMENTS = Mask(documents=((10, 14), (24,)))


def model_on(device, dtype, changes, kernels=None):
    cfg = ModelConfig.model_validate(SHAPE | changes)
    widths = (cfg.hidden, cfg.ffn.hidden) if cfg.ffn.kind == "moe" else ()
    heads = {"heads": 4, "head_dim": cfg.head_dim, "value_head_dim": cfg.value_head_dim}
    call = Call(device=device, dtype=dtype, parameter_dtype=torch.float32, documents=True, expert_widths=widths, **heads)
    with torch.device("meta"):
        model = build(cfg, resolve(kernels or {}, call), 16)
    model = model.to(dtype).to_empty(device="cpu")
    initialise(model, cfg, 3)
    return model.to(device)


def tokens():
    return torch.randint(0, 61, (2, 25), generator=torch.Generator().manual_seed(0))


def step(model, device):
    ids, positions = tokens().to(device), torch.arange(24, device=device).expand(2, 24)
    loss = model(ids[:, :-1], positions=positions, mask=DOCUMENTS, targets=ids[:, 1:])["ce_sum"]
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "loss_error", "gradient_error"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 5e-3, 0.1)])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_cpus_in_fp64(name, dtype, loss_error, gradient_error):
    """bf16: some ten roundings of 2^-9 on the way to each gradient; weights are rounded alike on both sides."""
    torch.set_num_threads(1)
    before = stand_in.calls.copy()
    model = model_on("npu", dtype, MODELS[name])
    loss, grads = step(model, "npu")
    called = {op for op, count in stand_in.calls.items() if count > before[op]}
    assert (DENSE | EXPERTS if name in WITH_EXPERTS else DENSE) <= called
    exact = model_on("cpu", torch.float64, MODELS[name])
    exact.load_state_dict({key: value.double().cpu() for key, value in model.state_dict().items()})
    want, exact_grads = step(exact, "cpu")
    assert abs(loss / want - 1) < loss_error
    for key, grad in exact_grads.items():
        # One token that a rounded score sends to another expert changes a gradient by as much as its own size.
        if dtype == torch.float32 or name not in WITH_EXPERTS:
            assert (grads[key] - grad).norm() < gradient_error * grad.norm(), key


@pytest.mark.parametrize("name", ["dense", "latent"])
def test_generation_with_a_cache_has_the_logits_of_the_whole(name):
    torch.set_num_threads(1)
    model, ids = model_on("npu", torch.float32, MODELS[name]), tokens().to("npu")
    cache, positions = KVCache(25), torch.arange(25, device="npu").expand(2, 25)
    with torch.no_grad():
        whole = model(ids, positions=positions, mask=Mask())["logits"]
        parts = []
        for first, last in ((0, 9), (9, 14), (14, 15), (15, 25)):
            parts.append(model(ids[:, first:last], positions=positions[:, first:last], mask=Mask(), cache=cache)["logits"])
    assert (torch.cat(parts, 1) - whole).abs().max().item() < 1e-5


def test_named_implementations_call_no_fused_operator():
    before = stand_in.calls.copy()
    names = ("attention", "rms_norm", "rope", "swiglu", "cross_entropy")
    step(model_on("npu", torch.float32, MODELS["dense"], dict.fromkeys(names, "reference")), "npu")
    called = {op for op, count in stand_in.calls.items() if count > before[op]}
    assert not called & DENSE and not [op for op in called if "fusion" in op or "norm" in op]
