"""The map's names and shapes are those that megatron-core 0.12.1, which Ascend's stack pins, gives its own parameters.

Recorded by `tests/support/megatron_names.py`; tests/engines compares the record with megatron-core itself.
"""

import json
from pathlib import Path

import pytest
from megatron_files import random_weights

from llmtrain.config.model import ModelConfig
from llmtrain.convert.megatron_map import to_megatron

RECORD = json.loads((Path(__file__).parent / "recorded" / "megatron_core_0.12.1.json").read_text())["models"]
SHAPE = {"vocab_size": 61, "layers": 2, "hidden": 32, "ffn": {"hidden": 48}}
GROUPED = {"heads": 4, "kv_heads": 2}
LATENT = {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
EXPERTS = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "dense_layers": 1, "dense_hidden": 48, "shared_experts": 1}
ROUTER = {"router": {"score": "sigmoid", "bias_rate": 0.001}}
BIASES = {"norm": {"kind": "layer_norm"}, "ffn": {"hidden": 48, "activation": "gelu", "bias": True}}
MODELS = {
    "dense": {"attention": GROUPED | {"qk_norm": True}},
    "biases": BIASES | {"attention": GROUPED | {"qkv_bias": True, "out_bias": True}},
    "latent": {"attention": LATENT},
    "experts": {"attention": GROUPED, "ffn": EXPERTS | ROUTER},
}


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes(model):
    cfg = ModelConfig.model_validate(SHAPE | MODELS[model])
    found = {name: list(tensor.shape) for name, tensor in to_megatron(cfg, random_weights(cfg), multiple=64).items()}
    assert found == RECORD[model]
