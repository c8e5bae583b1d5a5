"""The rope part of a config.json -> our `model.position` section. Needs no torch."""

import json
import math
from collections.abc import Mapping
from typing import Any

from llmtrain.errors import UserError


def position_values(config: Mapping[str, Any], *, where: str, base: float = 10_000.0) -> dict[str, Any]:
    """`model.position` of `config`, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    As in transformers, `rope_scaling` wins where both are given. `base` is that of a file without one. Raises UserError for a rule other
    than default, llama3 and yarn.
    """
    rope = _rope(config, where)
    base = rope.get("rope_theta", config.get("rope_theta", base))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {partial} cannot be imported; allowed: 1, every dim of a head is rotated")
    if not _is_number(base) or base <= 0:
        raise UserError(f"{where}: rope_theta {base!r} cannot be imported; allowed: a number > 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in RULES:
        raise UserError(f"{where}: rope_type {kind!r} cannot be imported; allowed: {', '.join(RULES)}")
    return {"kind": "rope", "base": float(base), "scaling": RULES[kind](rope, config, where)}


def latent_scale(config: Mapping[str, Any], head_dim: int, *, where: str) -> float | None:
    """What DeepSeek-V3 multiplies scores of heads of `head_dim` numbers by; None for 1 / sqrt(head_dim).

    A stretched RoPE with `mscale_all_dim` m multiplies that by (0.1 m ln(factor) + 1)^2.
    """
    rope = _rope(config, where)
    over = rope.get("mscale_all_dim")
    if not over or rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    return head_dim**-0.5 * magnitude(_number(rope, "factor", where), over) ** 2


def magnitude(factor: float, over: float) -> float:
    """0.1 m ln(factor) + 1: by how much YaRN magnifies what is rotated (arXiv 2309.00071 eq. 22) times m; 1 for a factor up to 1."""
    return 0.1 * over * math.log(factor) + 1 if factor > 1 else 1.0


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {field} {rope!r} cannot be imported; allowed: a mapping with rope_type")
    nested = [value for value in rope.values() if isinstance(value, dict)]
    if nested and any(value != nested[0] for value in nested):
        raise UserError(f"{where}: {field} {json.dumps(rope)[:120]} cannot be imported; allowed: the same rope in every layer")
    return nested[0] if nested else rope


def _default(rope: dict, config: Mapping[str, Any], where: str) -> None:
    return None


def _llama3(rope: dict, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {"kind": "llama3"} | {name: _number(rope, name, where) for name in names} | {"original_seq_len": _original(rope, config, where)}


def _yarn(rope: dict, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if rope.get("truncate", True) is not True:
        raise UserError(f"{where}: yarn with truncate {rope['truncate']} cannot be imported; allowed: true")
    original = _original(rope, config, where)
    longest = config.get("max_position_embeddings")
    factor = longest / original if rope.get("factor") is None and _is_number(longest) else _number(rope, "factor", where)
    betas = {"beta_fast": float(rope.get("beta_fast") or 32), "beta_slow": float(rope.get("beta_slow") or 1)}
    scaling = {"kind": "yarn", "factor": factor, "original_seq_len": original} | betas
    return scaling | {"attention_factor": _attention_factor(rope, factor)}


def _attention_factor(rope: dict, factor: float) -> float | None:
    """What cos and sin are multiplied by, where the file departs from the paper's 0.1 ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if not over or not under:
        return None
    return magnitude(factor, over) / magnitude(factor, under)


RULES = {"default": _default, "llama3": _llama3, "yarn": _yarn}


def _original(rope: dict, config: Mapping[str, Any], where: str) -> int:
    candidates = (
        (config, "original_max_position_embeddings"),
        (rope, "original_max_position_embeddings"),
        (config, "max_position_embeddings"),
    )
    for values, name in candidates:
        if values.get(name) is not None:
            return int(_number(values, name, where))
    raise UserError(f"{where}: original_max_position_embeddings is missing; allowed: an integer > 0")


def _number(values: Mapping[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    if not _is_number(value) or value <= 0:
        raise UserError(f"{where}: {name} of the rope {'is missing' if value is None else repr(value)}; allowed: a number > 0")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
