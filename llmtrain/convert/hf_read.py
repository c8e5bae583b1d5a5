"""config.json of a Hugging Face model -> our `model` section; the inverse of `hf_config`. Needs no torch."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtrain.convert.rope_read import position_values
from llmtrain.errors import UserError

CONFIG = "config.json"

# Fields that change what is computed and that none of these classes has: a file that sets one means another model than its class.
_FOREIGN = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
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
    architecture = _architecture(read)
    _refuse(read)
    values = _shared(read) | {"position": position_values(config, where=where)}
    return ARCHITECTURES[architecture](read, values)


class Fields:
    """Access to config.json whose errors name file, field, value and what is allowed."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; must be there if it has no default."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, value, "an integer > 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(name, value, "a number > 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value; null is the default."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return default if value is None else value

    def error(self, name: str, value: Any, allowed: str) -> UserError:
        """What to raise for a field that cannot be imported."""
        given = "is missing" if value is None else f"{json.dumps(value)[:80]} cannot be imported"
        return UserError(f"{self.where}: {name} {given}; allowed: {allowed}")


def _architecture(read: Fields) -> str:
    named = read.config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        types = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
        named = [types.get(str(read.config.get("model_type")), named or read.config.get("model_type"))]
    if named[0] not in ARCHITECTURES:
        raise UserError(f"{read.where}: architecture {named[0]!r} cannot be imported; allowed: {', '.join(ARCHITECTURES)}")
    return named[0]


def _refuse(read: Fields) -> None:
    """What would load and then compute something else."""
    config = read.config
    if config.get("quantization_config"):
        raise read.error("quantization_config", config["quantization_config"], "null; convert the unquantised model, or its GGUF file")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise read.error("hidden_act", config["hidden_act"], "silu")
    if config.get("attention_dropout"):
        raise read.error("attention_dropout", config["attention_dropout"], "0: there is no dropout here, training would differ")
    for name in _FOREIGN:
        if config.get(name) not in (None, False, 0, []):
            raise read.error(name, config[name], "null: these architectures have none")


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
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads", heads), "head_dim": _head_dim(read, values)}
    values["attention"] |= {"qkv_bias": bias, "out_bias": bias}
    values["ffn"]["bias"] = read.flag("mlp_bias")
    return values


def _qwen2(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    values["max_seq_len"] = read.integer("max_position_embeddings", 32_768)
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads"), "head_dim": _head_dim(read, values)}
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


ARCHITECTURES: dict[str, Callable[[Fields, dict[str, Any]], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "PanguEmbeddedForCausalLM": _openpangu,
}


def _head_dim(read: Fields, values: dict[str, Any]) -> int:
    heads, hidden = values["attention"]["heads"], values["hidden"]
    if read.config.get("head_dim") is None and hidden % heads:
        raise read.error("head_dim", None, f"an integer, since hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return read.integer("head_dim", hidden // heads)


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
