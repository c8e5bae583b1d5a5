"""Models that transformers made come in, give the same logits, and go back to the bit."""

import json

import pytest
import torch
from hf_models import OWN, SHAPE, make, ours, save, tokens
from safetensors.torch import load_file, save_file

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.convert.export import export_hf
from llmtrain.convert.hf_read import model_config, model_values, read_config
from llmtrain.convert.import_hf import load_into, read_weights
from llmtrain.errors import UserError
from llmtrain.ops import Mask

transformers = pytest.importorskip("transformers", reason="the import is checked against transformers")
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
CASES = {
    "llama": {},
    "llama, multi-head": {"num_key_value_heads": 4},
    "llama, multi-query, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, head dim": {"head_dim": 16},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, base and eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2},
    "llama, llama3 rope": {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
    "llama, yarn": {"rope_parameters": YARN},
    "llama, yarn, own factor": {"rope_parameters": YARN | {"attention_factor": 1.7}},
    "llama, yarn, betas": {"rope_parameters": YARN | {"rope_theta": 10.0, "beta_fast": 1.2, "beta_slow": 0.3}},
    "llama, yarn, mscale": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen2, window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "qwen2, no window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "qwen3, head dim, tied": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3, biases": {"head_dim": 16, "attention_bias": True},
    "qwen3, window": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "mixtral": {},
    "mixtral, window, top 1, tied": {"sliding_window": 7, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    "mixtral, head dim, yarn": {"head_dim": 16, "rope_parameters": YARN},
    "qwen3_moe": {},
    "qwen3_moe, norm": {"norm_topk_prob": True, "head_dim": 16, "num_experts": 6},
    "qwen3_moe, dense first, tied": {"mlp_only_layers": [0], "tie_word_embeddings": True},
    "qwen3_moe, biases, window": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 7},
    "deepseek_v3": {},
    "deepseek_v3, no query rank, as they are": {"q_lora_rank": None, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "deepseek_v3, no groups, two shared, eps": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rms_norm_eps": 1e-3},
    "deepseek_v3, all experts, tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
    "deepseek_v3, all dense": {"first_k_dense_replace": 2},
    "deepseek_v3, none shared": {"n_shared_experts": 0},
    "deepseek_v3, yarn": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v3, yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.4}},
    "deepseek_v3, yarn, scale alone": {"rope_parameters": YARN | {"mscale_all_dim": 0.7}},
    "deepseek_v3, yarn, plain": {"rope_parameters": YARN | {"mscale": 0.7}},
}


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["single file", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_in_equal_logits_and_back_to_the_bit(case, shard, tmp_path):
    theirs = make(case.split(",")[0], CASES[case])
    folder = save(theirs, tmp_path / "hf", shard=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    cfg, model = ours(folder)
    with torch.no_grad():
        expected, got = theirs(tokens()).logits, model(tokens(), mask=Mask())["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    back = export_hf(tmp_path / "back", cfg, read_weights(folder, cfg), shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    weights = again.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, expected)
    assert model_config(back) == cfg


OLD = {
    "rope_theta": {"rope_theta": 500.0},
    "llama3": {"rope_theta": 1e4, "rope_scaling": LLAMA3},
    "yarn, by its old name": {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "null scaling": {"rope_theta": 1e4, "rope_scaling": None},
}


@pytest.mark.parametrize("case", OLD)
def test_files_of_transformers_4(case, tmp_path):
    folder = save(make("llama", {}), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | OLD[case]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(folder)[1](tokens(), mask=Mask())["logits"], theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_kept_or_cast_to_the_target(tmp_path):
    folder = save(make("llama", {}).bfloat16(), tmp_path / "hf")
    cfg = model_config(folder)
    read = dict(read_weights(folder, cfg))
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    target = {"final_norm.weight": torch.zeros(32, dtype=torch.float64)}
    load_into(target, folder, cfg)
    assert target["final_norm.weight"].dtype == torch.float64
    assert torch.equal(target["final_norm.weight"], read["final_norm.weight"].double())


def test_some_tensors_only(tmp_path):
    folder = save(make("llama", {}), tmp_path / "hf")
    cfg = model_config(folder)
    assert [name for name, _ in read_weights(folder, cfg, names=["head.weight", "blocks.1.ffn_norm.weight"])] == [
        "head.weight",
        "blocks.1.ffn_norm.weight",
    ]
    with pytest.raises(UserError, match=r"no Hugging Face counterpart of blocks\.2\.ffn_norm\.weight"):
        list(read_weights(folder, cfg, names=["blocks.2.ffn_norm.weight"]))
    with pytest.raises(UserError, match=r"head\.weight has shape \[98, 32\] in the model, \[97, 32\]"):
        load_into({"head.weight": torch.zeros(98, 32)}, folder, cfg)


QWEN3_MOE, MIXTRAL, DEEPSEEK = (
    {"architectures": [f"{name}ForCausalLM"]} | OWN[family]
    for name, family in (("Qwen3Moe", "qwen3_moe"), ("Mixtral", "mixtral"), ("DeepseekV3", "deepseek_v3"))
)
# What a file must not say, and how that is refused.
REFUSED = {
    "architecture 'GPT2LMHeadModel' .*allowed: LlamaForCausalLM, Qwen2ForCausalLM": {"architectures": ["GPT2LMHeadModel"]},
    "architecture 'mamba'": {"architectures": None, "model_type": "mamba"},
    'hidden_act "gelu" cannot be imported; allowed: silu': {"hidden_act": "gelu"},
    "partial_rotary_factor 0.5": {"partial_rotary_factor": 0.5},
    "rope_type 'linear' .*allowed: default, llama3, yarn": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn with truncate False": {"rope_parameters": YARN | {"truncate": False}},
    "factor of the rope is missing": {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 16}},
    "the same rope in every layer": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
    "quantization_config .*null": {"quantization_config": {"quant_method": "gptq"}},
    "attention_dropout 0.1 .*training would differ": {"attention_dropout": 0.1},
    "num_experts 8": {"num_experts": 8},
    "hidden_size is missing; allowed: an integer > 0": {"hidden_size": None},
    "num_hidden_layers true": {"num_hidden_layers": True},
    'vocab_size "97"': {"vocab_size": "97"},
    "rms_norm_eps 0 ": {"rms_norm_eps": 0},
    'tie_word_embeddings "yes"': {"tie_word_embeddings": "yes"},
    "head_dim is missing; allowed: an integer, since hidden_size 33": {"hidden_size": 33},
    "attention.heads 4 is not a multiple of attention.kv_heads 3": {"num_key_value_heads": 3},
    "layer_types .*one kind of attention": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "max_window_layers 1 .*one kind of attention": {
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "use_sliding_window false .*true, since layer_types": {
        "architectures": ["Qwen2ForCausalLM"],
        "layer_types": ["sliding_attention"] * 2,
    },
    "num_key_value_heads is missing": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": None},
    "decoder_sparse_step 2 cannot be imported; allowed: 1": QWEN3_MOE | {"decoder_sparse_step": 2},
    "mlp_only_layers .*the first layers alone": QWEN3_MOE | {"mlp_only_layers": [1]},
    "shared_expert_intermediate_size 24": QWEN3_MOE | {"shared_expert_intermediate_size": 24},
    "n_routed_experts 8": QWEN3_MOE | {"n_routed_experts": 8},
    "architecture 'Qwen2MoeForCausalLM'": {"architectures": ["Qwen2MoeForCausalLM"]},
    "router_jitter_noise 0.1": MIXTRAL | {"router_jitter_noise": 0.1},
    "top_k 9 is more than model.ffn.experts 4": MIXTRAL | {"num_experts_per_tok": 9},
    'topk_method "group_limited_greedy" cannot be imported; allowed: "noaux_tc"': DEEPSEEK | {"topk_method": "group_limited_greedy"},
    'scoring_func "softmax"': DEEPSEEK | {"scoring_func": "softmax"},
    "moe_layer_freq 2": DEEPSEEK | {"moe_layer_freq": 2},
    "rope_interleave false": DEEPSEEK | {"rope_interleave": False},
    "attention_bias true": DEEPSEEK | {"attention_bias": True},
    "num_key_value_heads 2 .*num_attention_heads, 4": DEEPSEEK | {"num_key_value_heads": 2},
    "n_group is missing": DEEPSEEK | {"n_group": None},
    "n_shared_experts is missing": DEEPSEEK | {"n_shared_experts": None},
    "rope_type 'longrope'": DEEPSEEK | {"rope_scaling": {"type": "longrope", "factor": 2.0}},
    "num_local_experts 4": DEEPSEEK | {"num_local_experts": 4},
    "bias true cannot be imported; allowed: false together with sandwich_norm": {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "sandwich_norm": True,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_compute_something_else_is_refused(message, tmp_path):
    config = SHAPE | {"architectures": ["LlamaForCausalLM"]} | REFUSED[message]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UserError, ValueError), match=message) as raised:
        model_config(tmp_path)
    if isinstance(raised.value, UserError):
        assert str(raised.value).startswith(str(tmp_path / "config.json"))


def test_fields_left_out_are_transformers_defaults():
    left_out = ("max_position_embeddings", "tie_word_embeddings", "initializer_range")
    for family in ("Llama", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe", "DeepseekV3"):
        shape = {name: value for name, value in SHAPE.items() if name not in left_out} | {"num_attention_heads": 128, "hidden_size": 256}
        shape |= {"num_hidden_layers": 5, "num_key_value_heads": 128}
        whole, architecture = getattr(transformers, f"{family}Config")(**shape).to_dict(), {"architectures": [f"{family}ForCausalLM"]}
        assert model_values(shape | architecture) == model_values(whole | architecture)
    few = {name: value for name, value in shape.items() if name != "num_key_value_heads"}
    for family, heads in (("Mixtral", 8), ("Qwen3Moe", 4), ("DeepseekV3", 128)):
        read = model_values(few | {"architectures": [f"{family}ForCausalLM"]})["attention"]
        assert read.get("kv_heads", read["heads"]) == getattr(transformers, f"{family}Config")().num_key_value_heads == heads


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_published_sizes_count_as_in_transformers(family):
    """The defaults of transformers' classes are Mixtral 8x7B, a Qwen3-MoE, and DeepSeek-V3 671B."""
    config = getattr(transformers, f"{family}Config")()
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    cfg = ModelConfig.model_validate(model_values(config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}))
    assert count_parameters(cfg)["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_both_names_of_the_number_of_experts():
    for name in ("num_experts", "num_local_experts"):  # transformers 4 writes the first of Qwen3-MoE, 5 the second
        config = QWEN3_MOE | SHAPE | {"num_experts": None} | {name: 4}
        assert model_values(config)["ffn"]["experts"] == 4


def test_experts_in_several_formats_are_refused(tmp_path):
    folder = save(make("mixtral", {}), tmp_path / "hf")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    changed(folder, lambda weights: weights.update({name: weights[name].half()}))
    assert "the experts of blocks.1.ffn.experts.gate_proj are stored in several formats: F16, F32" in refusal(folder)
    changed(folder, lambda weights: weights.pop(name))
    assert f"missing: {name}" in refusal(folder)


def test_no_config(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file; a Hugging Face model is a folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds a list"):
        read_config(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return save(make("llama", {}), tmp_path / "hf")


def changed(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refusal(folder) -> str:
    """The error before anything is loaded: no target is touched."""
    cfg = model_config(folder)
    target = torch.full((32,), 7.0)
    with pytest.raises(UserError) as raised:
        load_into({"final_norm.weight": target}, folder, cfg)
    assert torch.equal(target, torch.full((32,), 7.0))
    with pytest.raises(UserError):
        next(read_weights(folder, cfg))
    return str(raised.value)


def test_missing_strange_and_misshapen_tensors_are_named_at_once(folder):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.self_attn.sinks"] = torch.zeros(4)
        weights["model.norm.weight"] = torch.zeros(31)
        weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)

    changed(folder, change)
    text = refusal(folder)
    assert "missing: model.layers.1.mlp.up_proj.weight" in text
    assert "not expected: model.layers.0.self_attn.sinks" in text
    assert "model.norm.weight has shape [31], config.json makes it [32]" in text
    assert "lm_head.weight is stored as I8; allowed: F64, F32, F16, BF16" in text


def test_an_absent_head_points_to_tying(folder):
    changed(folder, lambda weights: weights.pop("lm_head.weight"))
    assert "missing: lm_head.weight; config.json says tie_word_embeddings false" in refusal(folder)


def test_harmless_buffers_and_a_spare_head_are_passed_over(folder, tmp_path):
    changed(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    ours(folder)
    tied = save(make("llama", {"tie_word_embeddings": True}), tmp_path / "tied")
    changed(tied, lambda weights: weights.update({"lm_head.weight": torch.zeros(97, 32)}))
    assert "head.weight" not in dict(ours(tied)[1].named_parameters())


def test_a_file_cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is cut short" in refusal(folder)


def test_a_shard_that_is_not_there_or_lacks_a_tensor(tmp_path):
    folder = save(make("llama", {}), tmp_path / "hf", shard="20KB")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    norm = folder / table["weight_map"]["model.norm.weight"]
    held = load_file(norm)
    norm.unlink()
    assert f"{norm}: no such file, but model.safetensors.index.json lists it" in refusal(folder)
    held.pop("model.norm.weight")
    save_file(held | {"spare": torch.zeros(1)}, norm)
    assert "lacks model.norm.weight, which model.safetensors.index.json says it holds" in refusal(folder)
    table["weight_map"]["model.norm.weight"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(table))
    assert "no index of safetensors files" in refusal(folder)


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    text = refusal(folder)
    assert "pytorch_model.bin, a pickle, which may run any code" in text and "save_pretrained" in text
