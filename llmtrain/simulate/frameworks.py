"""What is known of how each framework runs what a published row names: kernels, overlap, formats. Not fitted, and the same for all rows.

From the frameworks' own code and documentation. torchtitan: FSDP2 over fp32 masters, activation checkpointing that keeps each second
product, FlashAttention 2 through SDPA, memory reported as reserved; from 2025 on its loss is compiled too, which keeps 16-bit logits
alone. nanotron: bf16 gradients beside fp32 ones, reduced in hooks; gathered inputs of products are kept. Megatron-LM of 2022 (arXiv
2205.05198): attention with a score matrix and dropout. Megatron-Core in benchmarks: communication of tp overlapped (userbuffers), tokens
sent once per node (DeepEP, HybridEP); its CI has neither. MindSpeed: MC2 where a row says so, and for figures of tuned runs that name no
mesh.
"""

import re
from collections.abc import Mapping

from llmtrain.simulate.case import Habits

Row = Mapping[str, str]


def habits_of(row: Row) -> Habits:
    """Of the framework of a row; its notes say what was switched on."""
    name, notes = row["framework"].lower(), row["notes"].lower()
    if "torchtitan" in name:
        return _torchtitan(row, notes)
    if "nanotron" in name:
        return Habits("nanotron", second_gradient=2, copies=True, keeps_gathered=True, even_layers=True, older_attention=True)
    if "mindspeed" in name:
        return _mindspeed(row, notes)
    if re.search(r"bridge|core", name):
        tuned = "ci golden" not in row["source"].lower()
        spread = "sequence-parallel flag absent" not in notes
        return Habits("megatron-core", gathers_rows=True, tp_hidden=tuned, sends_once=tuned, even_layers=True, tp_ranks_share_input=spread)
    if "megatron" in name or "megascale" in name:
        later = "megascale" in name
        spread = later or "sequence parallel" in row["recompute"]
        return Habits(
            "megatron-lm", gathers_rows=True, flash=later, dropout=True, dp_hidden=later, even_layers=True, tp_ranks_share_input=spread
        )
    return Habits("other", tp_hidden=True, even_layers=True)


def _torchtitan(row: Row, notes: str) -> Habits:
    fused = ("compile" in notes and "no compile" not in notes) or "async tp" in notes
    later = fused and "2025" in row["locator"] and "2024" not in row["locator"]
    return Habits(
        "torchtitan",
        fused=fused,
        copies=not fused,
        keeps_gathered=True,
        tp_hidden="async tp" in notes,
        half_products=True,
        reserved=True,
        older_attention=True,
        even_layers=True,
        weight_bytes=0,
        logit_bytes=4 if later else 10,
    )


def _mindspeed(row: Row, notes: str) -> Habits:
    early = "before system optimisation" in notes
    return Habits(
        "mindspeed",
        gathers_rows=True,
        fused=not early,
        flash="no flash attention" not in notes,
        tp_hidden=("mc2" in notes or not row["tp"]) and not early,
        even_layers=True,
        tp_ranks_share_input=not row["tp"] or int(row["tp"]) > 1,
        reuses_master="reuse-fp32-param" in notes,
    )


def recompute_of(row: Row, habits: Habits) -> frozenset[str]:
    """What the backward pass computes again, in the words of `Case.recompute`."""
    text = row["recompute"].lower()
    if not text and habits.name == "torchtitan":
        text = "selective"  # the setting of its own configuration for Llama 3 8B
    if text.startswith("full"):
        return frozenset({"full"})
    if text.startswith("selective"):
        return frozenset({"half_products"} if habits.half_products else {"attention"})
    words = {"act": "activation", "norm": "norms", "moe": "moe"}
    return frozenset(what for word, what in words.items() if word in text)
