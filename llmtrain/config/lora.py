"""Low-rank adapters: which projections of a model they stand beside, and what they cost. Needs no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveFloat, model_validator

from llmtrain.config.base import Section
from llmtrain.config.model import ModelConfig

if TYPE_CHECKING:
    from llmtrain.config.run import RunConfig

Target = Literal["q", "k", "v", "o", "gate", "up", "down", "q_down", "q_up", "kv_down", "kv_up"]
"""Projections by their names in the model, without `_proj`; `o` is `out_proj`."""
FEED_FORWARD = ("gate", "up", "down")


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the model's weights stay as they are, narrow matrices beside them are trained."""

    rank: NonNegativeInt = 0
    """Width of the adapters; 0 trains all weights instead."""
    alpha: PositiveFloat = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: Literal["all"] | list[Target] = "all"
    """Projections of every block that get one: of q, k, v, o, gate, up, down; with latent attention q_down, q_up, kv_down, kv_up, o."""
    merge: bool = False
    """checkpoint.export writes the whole model with the adapters added to its weights, instead of the adapters alone."""

    @model_validator(mode="after")
    def _named_once(self) -> "LoraConfig":
        if not self.targets or (len(set(self.targets)) < len(self.targets) and self.targets != "all"):
            raise ValueError(f"targets {self.targets}: name one projection or several, each once, or `all`")
        return self

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def target_shapes(block: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the projections in a block, `block` being `model.of_block(i)`; those of experts are not among them."""
    a, d = block.attention, block.hidden
    queries, values = a.heads * block.head_dim, a.heads * block.value_head_dim
    if a.kind == "mla":
        shapes = {} if a.query_rank is None else {"q_down": (a.query_rank, d)}
        shapes |= {"q_up": (queries, a.query_rank or d), "kv_down": (a.kv_rank + a.rope_dim, d)}
        shapes |= {"kv_up": (a.heads * (a.nope_dim + a.value_dim), a.kv_rank)}
    else:
        keys = block.kv_heads * block.head_dim
        shapes = {"q": (queries, d), "k": (keys, d), "v": (keys, d)}
    shapes["o"] = (d, values)
    if block.ffn.kind == "moe":
        return shapes
    inside = block.ffn.hidden
    gate = {"gate": (inside, d)} if block.ffn.activation == "swiglu" else {}
    return shapes | gate | {"up": (inside, d), "down": (d, inside)}


def targets_of(lora: LoraConfig, model: ModelConfig) -> list[str]:
    """The targets by name. Raises ValueError for those that the model does not have."""
    known = target_shapes(model)  # of a block with experts, if the model has any
    wanted = list(known) if lora.targets == "all" else lora.targets
    if model.ffn.kind == "moe" and (lora.targets == "all" or set(wanted) & set(FEED_FORWARD)):
        raise ValueError(
            f"lora.targets {lora.targets}: the feed-forward branches of this model are experts, whose stacked weights get no adapters; "
            f"set lora.targets [{', '.join(known)}]"
        )
    if strange := [target for target in wanted if target not in known]:
        raise ValueError(f"lora.targets: this model has no {', '.join(strange)}; it has {', '.join(known)}")
    return wanted


def adapted(lora: LoraConfig, model: ModelConfig) -> list[str]:
    """Canonical names, such as `blocks.0.attention.q_proj`, of all projections with an adapter; none without adapters."""
    if not lora.rank:
        return []
    modules = [_module(target) for target in targets_of(lora, model)]
    return [f"blocks.{block}.{module}" for block in range(model.layers) for module in modules]


def _module(target: str) -> str:
    branch = "ffn" if target in FEED_FORWARD else "attention"
    return f"{branch}.{'out' if target == 'o' else target}_proj"


def adapter_parameters(lora: LoraConfig, model: ModelConfig) -> int:
    """Parameters of the adapters of all blocks; 0 without."""
    if not lora.rank:
        return 0
    shapes = target_shapes(model)
    return model.layers * lora.rank * sum(sum(shapes[target]) for target in targets_of(lora, model))


def check_lora(run: "RunConfig") -> None:
    """Raise ValueError for what does not go together with adapters."""
    lora, model = run.lora, run.model
    if not lora.rank:
        return
    targets_of(lora, model)
    if model.ffn.kind == "moe" and model.ffn.router.bias_rate is not None:
        raise ValueError(
            f"lora.rank {lora.rank}: model.ffn.router.bias_rate {model.ffn.router.bias_rate} moves the routers' biases, "
            "which are no part of an adapter; set it to null, or lora.rank 0"
        )
    if run.parallel.expert_placement is not None:
        raise ValueError(
            f"lora.rank {lora.rank}: parallel.expert_placement moves experts with their moments, of which frozen ones have none"
        )
