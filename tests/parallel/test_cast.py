"""16 bits on one rank: the numbers of FSDP2's mixed precision, gradients in the parameters' dtype, with recomputation and compilation."""

import pytest
import torch
from sameness import gradient_difference, loss_difference, merge
from worlds import run_world

BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16"}
ONE = {
    "fp32": {"changes": {}},
    "bf16": {"changes": BF16},
    "bf16, recompute full": {"changes": merge(BF16, {"train": {"recompute": "full"}})},
    "bf16, recompute selective": {"changes": merge(BF16, {"train": {"recompute": "selective"}})},
    "bf16, compiled": {"changes": merge(BF16, {"train": {"compile": "on"}})},
    "bf16, tied": {"changes": merge(BF16, {"model": {"tie_embeddings": True}})},
    "fp16": {"changes": FP16},
}
TWO = {
    "bf16, shard 2": {"changes": merge(BF16, {"parallel": {"dp_shard": 2}})},
    "bf16, tied, shard 2": {"changes": merge(BF16, {"parallel": {"dp_shard": 2}, "model": {"tie_embeddings": True}})},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    results = {}
    for ranks, scenarios in {1: ONE, 2: TWO}.items():
        folder = tmp_path_factory.mktemp(f"world-{ranks}")
        results |= run_world("sameness:train_all", ranks, args={"scenarios": scenarios}, folder=folder)
    return results


@pytest.mark.parametrize("name", ["bf16, recompute full", "bf16, recompute selective"])
def test_recomputed_blocks_cast_as_the_first_time(runs, name):
    assert runs[name]["losses"] == runs["bf16"]["losses"]
    assert gradient_difference(runs[name], runs["bf16"]) == 0


@pytest.mark.parametrize(("name", "one"), [("bf16, shard 2", "bf16"), ("bf16, tied, shard 2", "bf16, tied"), ("bf16, compiled", "bf16")])
def test_several_ranks_and_compiled_blocks_round_alike(runs, name, one):
    rounding = loss_difference(runs["bf16"], runs["fp32"])
    assert 1e-6 < rounding < 0.02
    assert loss_difference(runs[name], runs[one]) < 3 * rounding
    assert gradient_difference(runs[name], runs[one]) < 3 * gradient_difference(runs["bf16"], runs["fp32"])


def test_fp16_trains(runs):
    assert loss_difference(runs["fp16"], runs["fp32"]) < 0.02


def test_what_is_cast():
    from llmtrain.config.model import ModelConfig
    from llmtrain.model import build, initialise
    from llmtrain.ops import Call, Mask, resolve
    from llmtrain.parallel.cast import apply_cast

    torch.set_num_threads(1)
    values = {
        "vocab_size": 50,
        "layers": 2,
        "hidden": 32,
        "attention": {"heads": 4},
        "ffn": {"hidden": 48},
        "position": {"kind": "learned"},
        "mtp": {"heads": 1},
    }
    cfg = ModelConfig.model_validate(values | {"max_seq_len": 16})
    model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.bfloat16, head_dim=8, heads=4, kv_heads=4)), None)
    initialise(model, cfg, 0)
    names = [name for name, _ in model.named_parameters()]
    apply_cast(model, torch.bfloat16)
    seen = []
    hook = model.blocks["0"].ffn.register_forward_hook(lambda module, args, out: seen.extend((args[0].dtype, module.up_proj.weight.dtype)))
    tokens = torch.arange(16)[None]
    assert model(tokens, mask=Mask())["logits"].dtype == torch.bfloat16
    hook.remove()
    out = model(tokens, mask=Mask(), targets=tokens, ahead=[(tokens, tokens)])
    (out["ce_sum"] + out["mtp_ce_sum"]).backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters())
