"""The job that is measured: one model with fine-grained experts and with BigMac's, of equal size, at top-4 and top-8."""

from typing import Any, NamedTuple

RATIO = 0.25
"""r, BigMac's width of what is sent, and the width inside a fine-grained expert, by the model's."""


class Size(NamedTuple):
    """Of the model, and of what one rank computes in a step."""

    layers: int = 2
    hidden: int = 256
    heads: int = 4
    experts: int = 64
    vocabulary: int = 256
    sequences: int = 16
    length: int = 128


class Arm(NamedTuple):
    """What is compared: `kind` is `fine-grained` or `BigMac`."""

    kind: str
    top_k: int

    @property
    def name(self) -> str:
        return f"{self.kind} top-{self.top_k}"


FINE, BIGMAC = "fine-grained", "BigMac"
KINDS = (FINE, BIGMAC)
TOP_K = (4, 8)


def values(arm: Arm, size: Size, *, ranks: int) -> dict[str, Any]:
    """The run configuration as a dict. Experts have 2 r D^2 weights in both kinds: D -> rD -> D, and rD -> D -> rD.

    Tokens are dealt out evenly whatever the router says, so both kinds send the same rows and no rank waits for a fuller one.
    """
    narrow = int(size.hidden * RATIO)
    ffn = {"kind": "moe", "experts": size.experts, "top_k": arm.top_k, "activation": "gelu", "router": {"force_balance": True}}
    ffn |= {"hidden": narrow} if arm.kind == FINE else {"hidden": size.hidden, "descend": narrow}
    attention = {"heads": size.heads, "kv_heads": 1}  # as few dense weights as may be: gathering them is traffic beside that of the experts
    model = {"layers": size.layers, "hidden": size.hidden, "attention": attention, "ffn": ffn, "vocab_size": size.vocabulary}
    model |= {"tie_embeddings": True, "max_seq_len": 4 * size.length}
    return {
        "name": arm.name,
        "device": "cpu",
        "model": model,
        "train": {"steps": 1, "seq_len": size.length, "global_batch": size.sequences * ranks, "micro_batch": size.sequences},
        # Gathered dense weights stay for the backward pass: less traffic beside that of the experts.
        "parallel": {"dp_shard": ranks, "ep": ranks, "reshard_after_forward": False},
    }
