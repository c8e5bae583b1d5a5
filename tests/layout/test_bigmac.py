"""BigMac's closed form against the paper's numbers, and the built model and the dry mesh against the closed form, item by item."""

from pathlib import Path

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import flops_per_token
from llmtrain.config.run import RunConfig
from llmtrain.layout import bigmac
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.layout.traffic import traffic
from llmtrain.model import build
from llmtrain.ops import Call, resolve

PAGE = Path(__file__).parents[2] / "docs" / "moe.md"
LENGTH, ROWS, RANKS = 2048, 256, 32
TOKENS, GIB = LENGTH * ROWS, 2**30
FINE, BIGMAC = (ModelConfig(preset=f"gpt3_xl_{kind}") for kind in ("fine_grained", "bigmac"))
PAPER = 2e-4  # the paper rounds its inputs


def test_parameters_are_the_papers():
    assert [bigmac.parameters(model) / 1e9 for model in (FINE, BIGMAC)] == pytest.approx([3.729, 3.779], rel=PAPER)
    assert bigmac.parameters(BIGMAC) / bigmac.parameters(FINE) - 1 == pytest.approx(0.0135, abs=5e-5)


def test_flops_are_the_papers():
    found = [bigmac.flops(model, tokens=TOKENS, seq_len=LENGTH) / 1e12 for model in (FINE, BIGMAC)]
    assert found == pytest.approx([3490.4, 3648.7], rel=2e-5) and found == pytest.approx([3490.67, 3649.00], rel=PAPER)
    assert found[1] / found[0] - 1 == pytest.approx(0.0454, abs=5e-5)


def test_all_to_all_bytes_are_the_papers():
    assert [bigmac.all_to_all_bytes(model, tokens=TOKENS, ep=RANKS) / GIB for model in (FINE, BIGMAC)] == [1488, 372]


def test_vanilla_experts_send_as_much_as_fine_grained_ones_and_compute_more():
    """GShard's experts are four times as wide inside as the model, and twice a token's."""
    vanilla = FINE.model_copy(update={"ffn": FINE.ffn.model_copy(update={"hidden": 4 * 2048, "top_k": 2, "experts": 16})})
    assert bigmac.all_to_all_bytes(vanilla, tokens=TOKENS, ep=RANKS) / GIB == 1488 * 2 / 8
    more = bigmac.flops(vanilla, tokens=TOKENS, seq_len=LENGTH) - bigmac.flops(FINE, tokens=TOKENS, seq_len=LENGTH)
    assert more == pytest.approx(12 * TOKENS * 24 * 2048**2 * (4 * 2 - 0.25 * 8))


def built(model: ModelConfig) -> int:
    """Parameters of the model itself: layer norms, gelu, biases on all projections but BigMac's, learned positions."""
    with torch.device("meta"):
        module = build(model, resolve({}, Call(device="cpu", dtype=torch.float32)), 64)
    return sum(parameter.numel() for parameter in module.parameters())


def beyond_the_form(model: ModelConfig) -> dict[str, int]:
    """Parameters of the built model that the closed form leaves out."""
    ffn, width = model.ffn, model.ffn.descend or model.hidden
    narrow = min(width, ffn.hidden)
    return {
        "positions, 2,048 x 2,048": model.max_seq_len * model.hidden,
        "routers of 23 layers; the form has one": (model.layers - 1) * ffn.experts * model.hidden,
        "biases of experts, D + r D each; the form has 2 r D": model.layers * ffn.experts * (width + ffn.hidden - 2 * narrow),
    }


def sent(model: ModelConfig) -> tuple[float, float]:
    """Bytes of the rows, and of their numbers, that the ranks of ep 32 send in a step by the dry mesh's arithmetic."""
    train = {"steps": 1, "seq_len": LENGTH, "global_batch": ROWS, "micro_batch": ROWS // RANKS}
    cfg = RunConfig(model=model.model_dump(), train=train, parallel={"dp_shard": RANKS, "ep": RANKS}, precision="bf16")
    (segment,) = StepPlan.from_config(cfg).segments
    rows = [row for row in traffic(cfg, MeshShape.from_config(cfg.parallel), segment, rank=0) if row.axis == "ep"]
    numbers = 8 * model.ffn.experts * model.layers * (RANKS - 1)
    return RANKS * sum(row.bytes for row in rows) - numbers, numbers


@pytest.mark.parametrize("model", [FINE, BIGMAC], ids=["fine-grained", "bigmac"])
def test_the_built_model_is_the_form_and_what_is_itemised(model):
    form, items = bigmac.parameters(model), beyond_the_form(model)
    assert built(model) == form + sum(items.values()) and sum(items.values()) < 0.003 * form
    work, routers = bigmac.flops(model, tokens=TOKENS, seq_len=LENGTH), 6.0 * TOKENS * model.layers * model.ffn.experts * model.hidden
    assert flops_per_token(model, LENGTH, causal=False) * TOKENS == pytest.approx(work + routers) and routers < 0.003 * work
    assert sent(model)[0] == bigmac.all_to_all_bytes(model, tokens=TOKENS, ep=RANKS)


def test_the_page_says_so():
    """The table of docs/moe.md, line by line."""
    both = (FINE, BIGMAC)
    rows = [("parameters, closed form", [f"{bigmac.parameters(model):,}" for model in both])]
    rows += [(f"+ {name}", [f"{beyond_the_form(model)[name]:,}" for model in both]) for name in beyond_the_form(FINE)]
    rows += [("= built model", [f"{built(model):,} (+{built(model) / bigmac.parameters(model) - 1:.2%})" for model in both])]
    work = [bigmac.flops(model, tokens=TOKENS, seq_len=LENGTH) / 1e12 for model in both]
    counted = [flops_per_token(model, LENGTH, causal=False) * TOKENS / 1e12 for model in both]
    rows += [("TFLOP a step, closed form", [f"{value:,.1f}" for value in work])]
    rows += [("+ routers", [f"{ours - form:.1f}" for ours, form in zip(counted, work)])]
    rows += [("= `flops_per_token`, all keys", [f"{ours:,.1f} (+{ours / form - 1:.2%})" for ours, form in zip(counted, work)])]
    rows += [("GiB sent a step, closed form", [f"{bigmac.all_to_all_bytes(model, tokens=TOKENS, ep=RANKS) / GIB:,.0f}" for model in both])]
    rows += [("= `traffic` of rows, ep 32", [f"{sent(model)[0] / GIB:,.0f}" for model in both])]
    rows += [("numbers of rows beside them", [f"{sent(model)[1] / 2**20:.2f} MiB" for model in both])]
    page = PAGE.read_text(encoding="utf-8")
    for name, (fine, other) in rows:
        assert f"| {name} | {fine} | {other} |" in page
