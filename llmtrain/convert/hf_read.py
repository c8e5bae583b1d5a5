"""config.json of a Hugging Face model -> our `model` section; the inverse of `hf_config`. Needs no torch."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.convert.hf_experts import deepseek_v3, mixtral, qwen3_moe
from llmtrain.convert.hf_fields import Fields
from llmtrain.convert.rope_read import position_values
from llmtrain.errors import UserError

CONFIG = "config.json"

# Fields that change what is computed and that few of these classes have: a file of another one that sets one means another model.
_FOREIGN = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "shared_expert_intermediate_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "no_rope_layers",
)


def model_config(folder: str | Path):
    """The `ModelConfig` of the Hugging Face model in `folder`.

    Raises:
        UserError: no readable config.json, an architecture that is not one of ARCHITECTURES, or a field that means something that the
            model here cannot compute; the message names file, field, value and what is allowed.
    """
    from llmtrain.config.model import ModelConfig

    return ModelConfig.model_validate(model_values(read_config(folder), where=str(Path(folder) / CONFIG)))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of `folder`/config.json."""
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model is a folder with {CONFIG} and safetensors files") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a mapping")
    return values


def model_values(config: Mapping[str, Any], *, where: str = CONFIG) -> dict[str, Any]:
    """The `model` section, as plain values, that computes what transformers computes for `config`.

    `where` is how messages call the file. Fields left out have the defaults of transformers' configuration classes.
    """
    read = Fields(config, where)
    architecture = ARCHITECTURES[_architecture(read)]
    _refuse(read, architecture)
    values = _shared(read) | {"position": position_values(config, where=where, base=architecture.rope_base)}
    return architecture.values(read, values)


def _architecture(read: Fields) -> str:
    named = read.config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        types = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
        named = [types.get(str(read.config.get("model_type")), named or read.config.get("model_type"))]
    if named[0] not in ARCHITECTURES:
        raise UserError(f"{read.where}: architecture {named[0]!r} cannot be imported; allowed: {', '.join(ARCHITECTURES)}")
    return named[0]


def _refuse(read: Fields, architecture: "Architecture") -> None:
    """What would load and then compute something else."""
    config = read.config
    if config.get("quantization_config"):
        raise read.error("quantization_config", config["quantization_config"], "null; convert the unquantised model, or its GGUF file")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise read.error("hidden_act", config["hidden_act"], "silu")
    if config.get("attention_dropout"):
        raise read.error("attention_dropout", config["attention_dropout"], "0: there is no dropout here, training would differ")
    for name in _FOREIGN:
        if name not in architecture.own and config.get(name) not in (None, False, 0, []):
            raise read.error(name, config[name], "null: this architecture has none")


def _shared(read: Fields) -> dict[str, Any]:
    return {
        "vocab_size": read.integer("vocab_size"),
        "layers": read.integer("num_hidden_layers"),
        "hidden": read.integer("hidden_size"),
        "attention": {"heads": read.integer("num_attention_heads")},
        "ffn": {"hidden": read.integer("intermediate_size")},
        "norm": {"eps": read.number("rms_norm_eps", 1e-6)},
        "tie_embeddings": read.flag("tie_word_embeddings"),
    }


def _llama(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    heads, bias = values["attention"]["heads"], read.flag("attention_bias")
    values["max_seq_len"] = read.integer("max_position_embeddings", 2048)
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads", heads), "head_dim": read.head_dim(values)}
    values["attention"] |= {"qkv_bias": bias, "out_bias": bias}
    values["ffn"]["bias"] = read.flag("mlp_bias")
    return values


def _qwen2(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    values["max_seq_len"] = read.integer("max_position_embeddings", 32_768)
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads"), "head_dim": read.head_dim(values)}
    values["attention"] |= {"qkv_bias": True, "window": _window(read, values["layers"])}
    return values


def _qwen3(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    bias = read.flag("attention_bias")
    values["max_seq_len"] = read.integer("max_position_embeddings", 32_768)
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads"), "head_dim": read.integer("head_dim", 128)}
    values["attention"] |= {"qk_norm": True, "qkv_bias": bias, "out_bias": bias, "window": _window(read, values["layers"])}
    return values


def _openpangu(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """A Llama block whose attention biases are on unless the file says otherwise; with `sandwich_norm` it has four norms."""
    bias = read.flag("bias", True)
    values = _llama(read, values)
    values["attention"] |= {"qkv_bias": bias, "out_bias": bias}
    if read.flag("sandwich_norm"):
        if bias or values["ffn"]["bias"]:
            raise read.error("bias" if bias else "mlp_bias", True, "false together with sandwich_norm")
        values["norm"]["placement"] = "sandwich"
    return values


class Architecture(NamedTuple):
    """One class of transformers."""

    model_type: str
    values: Callable[[Fields, dict[str, Any]], dict[str, Any]]
    """Completes the section that `_shared` began."""
    own: tuple[str, ...] = ()
    """What it has of _FOREIGN."""
    rope_base: float = 10_000.0
    """Where the file has none."""


_COUNTS = ("num_experts", "num_local_experts")
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", _llama),
    "Qwen2ForCausalLM": Architecture("qwen2", _qwen2),
    "Qwen3ForCausalLM": Architecture("qwen3", _qwen3),
    "PanguEmbeddedForCausalLM": Architecture("PanguEmbedded", _openpangu),
    "MixtralForCausalLM": Architecture("mixtral", mixtral, _COUNTS, rope_base=1_000_000.0),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", qwen3_moe, _COUNTS),
    "DeepseekV3ForCausalLM": Architecture("deepseek_v3", deepseek_v3, ("n_routed_experts", "n_shared_experts")),
}


def _window(read: Fields, layers: int) -> int | None:
    """The sliding window of every layer; a mixture of windowed and full layers is refused."""
    sliding = read.flag("use_sliding_window") and read.config.get("sliding_window", 4096) is not None
    first = read.config.get("max_window_layers", 28)
    kinds = read.config.get("layer_types") or ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers or len(set(kinds)) > 1 or kinds[0] not in ("full_attention", "sliding_attention"):
        field = "layer_types" if read.config.get("layer_types") else "max_window_layers"
        raise read.error(field, read.config.get(field, first), f"one kind of attention for all {layers} layers, full or sliding")
    if kinds[0] == "full_attention":
        return None
    if not sliding:
        raise read.error(
            "use_sliding_window", read.config.get("use_sliding_window", False), "true, since layer_types says sliding_attention"
        )
    return read.integer("sliding_window", 4096)
