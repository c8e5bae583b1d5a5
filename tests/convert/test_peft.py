"""Adapters as PEFT's folders: the library, beside transformers' models, gives our logits."""

import json

import pytest
import torch
from hf_models import make, ours, save
from safetensors.torch import load_file

from llmtrain.config.lora import LoraConfig
from llmtrain.convert.adapters import is_adapter
from llmtrain.convert.peft import export_peft
from llmtrain.errors import UserError
from llmtrain.model.lora import add_adapters
from llmtrain.ops import Mask

TOKENS = torch.arange(4, 44).view(2, 20)
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mixtral": {},
    "deepseek_v3": {"rope_interleave": True},
}
TARGETS = {"mixtral": ["q", "k", "v", "o"], "deepseek_v3": ["q_down", "q_up", "kv_down", "kv_up", "o"]}


def adapted_model(folder, lora: LoraConfig):
    """(model section, model) of a folder, with adapters that do something."""
    cfg, model = ours(folder)
    add_adapters(model, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.2)
    return cfg, model


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits(tmp_path, family):
    peft = pytest.importorskip("peft", reason="it is what the folder is for")
    theirs = make(family, FAMILIES[family])
    lora = LoraConfig(rank=3, alpha=6, targets=TARGETS.get(family, "all"))
    cfg, model = adapted_model(save(theirs, tmp_path / "base"), lora)
    export_peft(tmp_path / "adapter", cfg.model_copy(update={"pretrained": "somewhere/base"}), lora, model.named_parameters())
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere/base"
    with torch.no_grad():
        plain = theirs(TOKENS).logits
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        expected, found = wrapped(TOKENS).logits, model(TOKENS, mask=Mask())["logits"]
    assert (expected - plain).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_names_and_shapes_are_pefts(tmp_path):
    lora = LoraConfig(rank=3, targets=["q", "down"])
    cfg, model = adapted_model(save(make("llama", {}), tmp_path / "base"), lora)
    export_peft(tmp_path / "adapter", cfg, lora, model.named_parameters(), dtype=torch.bfloat16)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items() if ".layers.1." in name} == {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (3, 32),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (32, 3),
        "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight": (3, 48),
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight": (32, 3),
    }
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    some = [(name, tensor) for name, tensor in model.named_parameters() if not name.endswith("1.ffn.down_proj.lora_b")]
    with pytest.raises(UserError, match=r"missing .*layers.1.mlp.down_proj.lora_B"):
        export_peft(tmp_path / "other", cfg, lora, some)
    assert not (tmp_path / "other").exists()
