"""The best shape of a model: width, depth, experts, kind of attention at one size (Pangu Ultra MoE's use of a simulator)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.simulate.memory import peak
from llmtrain.simulate.of_config import case_of
from llmtrain.simulate.rates import Rates
from llmtrain.simulate.step import price

UNIT = 128
"""What widths are multiples of: the matrix units of every accelerator here are full then."""


@dataclass(frozen=True)
class Axes:
    """What is tried; an empty list keeps what the model has."""

    layers: Sequence[int] = ()
    hidden: Sequence[int] = ()
    experts: Sequence[int] = ()
    top_k: Sequence[int] = ()
    attention: Sequence[str] = ()


@dataclass(frozen=True)
class Shape:
    """A model and what it costs."""

    model: ModelConfig
    parameters: int
    active: int
    flops: float
    """Of a token, forward and backward, by the keys that it sees."""
    tokens: float
    """Per second on all devices."""
    memory: float
    utilisation: float

    @property
    def words(self) -> str:
        """`61 x 7,680, mla, 256 experts of 2,048, top 8`."""
        ffn, model = self.model.ffn, self.model
        branch = f"{ffn.experts} experts of {ffn.hidden:,}, top {ffn.top_k}" if ffn.kind == "moe" else f"FFN of {ffn.hidden:,}"
        return f"{model.layers} x {model.hidden:,}, {model.attention.kind}, {branch}"


def shapes(
    cfg: RunConfig, hardware: Hardware, devices: int, rates: Rates, *, axes: Axes, budget: float | None = None, by: str = "parameters"
) -> list[Shape]:
    """Every shape on the run's own mesh, the one that trains most tokens a second first.

    budget: what all have alike, to 2%: the parameters, those that are `active`, or the `flops` of a token; the width of the branch gives
    way. None: the model's own number of parameters. Raises UserError where no shape fits the mesh.
    """
    wanted = budget or _size(cfg.model, cfg.train.seq_len, by)
    found = []
    for model in _models(cfg.model, axes):
        fitted = _to_budget(model, wanted, cfg.train.seq_len, by)
        if fitted is None:
            continue
        try:
            case = case_of(cfg.model_copy(update={"model": fitted}), hardware, devices)
        except UserError:
            continue
        step, counts = price(case, rates), count_parameters(fitted)
        flops = flops_per_token(fitted, case.seq_len)
        speed = case.tokens / step.seconds
        found.append(Shape(fitted, counts["total"], counts["active"], flops, speed, peak(case), flops * speed / (case.peak * devices)))
    if not found:
        raise UserError(f"no shape of the ones asked for has {wanted:.3g} {by} and fits the run's mesh")
    return sorted(found, key=lambda shape: -shape.tokens)


def _models(model: ModelConfig, axes: Axes) -> Iterator[ModelConfig]:
    moe = model.ffn.kind == "moe"
    lists = (
        axes.layers or [model.layers],
        axes.hidden or [model.hidden],
        (axes.experts if moe else ()) or [model.ffn.experts if moe else 0],
        (axes.top_k if moe else ()) or [model.ffn.top_k if moe else 0],
        axes.attention or [model.attention.kind],
    )
    for layers, hidden, experts, top_k, kind in product(*lists):
        values = model.model_dump(mode="json") | {"layers": layers, "hidden": hidden, "preset": None, "pretrained": None}
        if moe:
            values["ffn"] = values["ffn"] | {"experts": experts, "top_k": top_k}
        values["attention"] = _attention(values["attention"], kind, hidden, model)
        try:
            yield ModelConfig.model_validate(values)
        except ValueError:
            continue


def _attention(own: dict, kind: str, hidden: int, model: ModelConfig) -> dict:
    """Heads as the model has them; a change of kind takes Pangu Ultra's 8 key heads, or the narrow widths of DeepSeek-V3."""
    if own["kind"] == kind:
        return own
    if kind == "gqa":
        return {"kind": "gqa", "heads": own["heads"], "kv_heads": min(8, own["heads"]), "head_dim": model.value_head_dim}
    widths = {"query_rank": 1536, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    return {"kind": "mla", "heads": own["heads"], **widths}


def _size(model: ModelConfig, seq_len: int, by: str) -> float:
    if by == "flops":
        return flops_per_token(model, seq_len)
    counts = count_parameters(model)
    return counts["active" if by == "active" else "total"]


def _to_budget(model: ModelConfig, wanted: float, seq_len: int, by: str, tolerance: float = 0.02) -> ModelConfig | None:
    """The model with the branch as wide as the budget leaves it, in units of 128; None where that cannot be."""

    def sized(width: int) -> ModelConfig:
        return model.model_copy(update={"ffn": model.ffn.model_copy(update={"hidden": width})})

    if abs(_size(model, seq_len, by) / wanted - 1) <= tolerance / 4:
        return model
    low, high = (_size(sized(width), seq_len, by) for width in (UNIT, 2 * UNIT))
    units = round((wanted - low) / (high - low)) + 1
    if units < 1:
        return None
    found = sized(UNIT * units)
    return found if abs(_size(found, seq_len, by) / wanted - 1) <= tolerance else None
