"""What is known of how each framework runs what a published row names: kernels, overlap, formats. Not fitted, and the same for all rows.

From the frameworks' own code and documentation. torchtitan: FSDP2 over fp32 masters, activation checkpointing that keeps each second
product, FlashAttention 2 through SDPA, memory reported as reserved; from 2025 on its loss is compiled too, which keeps 16-bit logits
alone. nanotron (trainer.py, models/base.py, optim/): stages by the cost of blocks and head; without ZeRO, DDP with 16-bit buckets of 25 MiB
beside fp32 gradients, reduced in hooks; with ZeRO 1 no DDP: fp32 gradients are summed whole after the backward pass, and parameters
gathered tensor by tensor; gathered inputs of products are kept. Megatron-LM of 2022 (arXiv 2205.05198): attention with a score matrix
and dropout. Megatron-Core (tensor_parallel/cross_entropy.py): a loss in place, 16-bit logits and one fp32 copy; in benchmarks,
communication of tp overlapped (userbuffers) and tokens sent once per node (DeepEP, HybridEP); its CI has neither. MindSpeed: MC2 where a
row says so, and for figures of tuned runs that name no mesh; its attention keeps two maxima and sums of 8 fp32 numbers per query and head,
and pads latent attention's values; its CI reports memory after the first step. A logit of it takes 16 bytes, on which the two CI rows agree
whose peak is the loss.
"""

import re
from collections.abc import Mapping

from llmtrain.config.model import ModelConfig
from llmtrain.simulate.habits import Habits
from llmtrain.simulate.shapes import idle_layers

Row = Mapping[str, str]


def habits_of(row: Row) -> Habits:
    """Of the framework of a row; its notes say what was switched on."""
    name, notes = row["framework"].lower(), row["notes"].lower()
    if "torchtitan" in name:
        return _torchtitan(row, notes)
    if "nanotron" in name:
        return _nanotron(row)
    if "mindspeed" in name:
        return _mindspeed(row, notes)
    if re.search(r"bridge|core", name):
        tuned = "ci golden" not in row["source"].lower()
        spread = "sequence-parallel flag absent" not in notes
        return Habits(
            "megatron-core", gathers_rows=True, tp_hidden=tuned, sends_once=tuned, even_layers=True, tp_ranks_share_input=spread,
            dropout="dropout" in notes, logit_bytes=6,
        )  # fmt: skip
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
        stops_early=True,
        reserved=True,
        older_attention=True,
        even_layers=True,
        weight_bytes=0,
        logit_bytes=4 if later else 12,  # eager: log-probabilities, their gradient, and the logits' gradient, all in fp32
    )


def _nanotron(row: Row) -> Habits:
    sharded = "zero1" in row["shard"]
    hooks = not sharded and row["dp"] not in ("", "1")
    return Habits(
        "nanotron",
        second_gradient=2 if hooks else 0,
        dp_hidden=hooks,
        reduces_whole=sharded,
        tensor_launches=5,
        bucket_bytes=2 * 25 * 2**20 if hooks else 0.0,
        copies=True,
        keeps_gathered=True,
        older_attention=True,
    )


def _mindspeed(row: Row, notes: str) -> Habits:
    early = "before system optimisation" in notes
    return Habits(
        "mindspeed",
        gathers_rows=True,
        fused=not early,
        flash="no flash attention" not in notes,
        tp_hidden=("mc2" in notes or not row["tp"]) and not early,
        dp_hidden="gradients not overlapped" not in notes,
        ep_hidden="alltoall-overlap-comm" in notes,
        even_layers=True,
        tp_ranks_share_input=not row["tp"] or int(row["tp"]) > 1,
        reuses_master="reuse-fp32-param" in notes,
        statistics=64,
        pads_values=True,
        logit_bytes=16,
        chunked_loss="output-layer-slice" in notes,
        gradient_bytes=2 if "o2-gradient" in notes else 4,
        moment_bytes=2 if "o2-optimizer" in notes else None,
        first_step="ci baseline" in row["source"].lower(),
    )


def layers_of(row: Row, habits: Habits, model: ModelConfig, *, stages: int, ranks: int) -> tuple[int, ...] | None:
    """Blocks by stage where they are not even."""
    if row.get("layers_per_stage"):
        return tuple(map(int, row["layers_per_stage"].split(",")))
    if idle := idle_layers(row):
        each = -(-(model.layers + len(idle)) // stages)
        return tuple(each - sum(stage * each <= one < (stage + 1) * each for one in idle) for stage in range(stages))
    return _by_cost(model, ranks) if habits.name == "nanotron" and ranks > 1 else None


def _by_cost(model: ModelConfig, ranks: int) -> tuple[int, ...]:
    """nanotron's stages: each takes blocks until the sum of their parameters, with the head's, is above its share."""
    block = 4 * model.hidden**2 + 3 * model.ffn.hidden * model.hidden
    whole = model.layers * block + model.vocab_size * model.hidden
    found, stage = [0] * ranks, 0
    for number in range(1, model.layers + 1):
        found[stage] += 1
        stage += number * block > whole * (stage + 1) / ranks
    return tuple(found)


def recompute_of(row: Row, habits: Habits) -> frozenset[str]:
    """What the backward pass computes again, in the words of `Case.recompute`."""
    text = row["recompute"].lower()
    if not text and habits.name == "torchtitan":
        text = "selective"  # the setting of its own configuration for Llama 3 8B
    if text.startswith("full"):
        return frozenset({"full"})
    if text.startswith("selective"):
        return frozenset({"half_products"} if habits.half_products else {"attention"})
    words = {"act": "activation", "norm": "norms", "moe": "moe", "mla": "mla_up", "permute": "permute", "experts": "experts"}
    return frozenset(what for word, what in words.items() if word in text)
