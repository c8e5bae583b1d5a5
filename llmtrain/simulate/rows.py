"""The cases that a published row describes: its model, machine and mesh. What it leaves open gives several."""

import re
from collections.abc import Iterator, Mapping

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware, load
from llmtrain.simulate.case import FP4, FP8, Case
from llmtrain.simulate.frameworks import habits_of, layers_of, recompute_of
from llmtrain.simulate.habits import Habits
from llmtrain.simulate.shapes import model_of

HARDWARE = (
    (r"h100-96gb|h100 96gb", "h100-96"),
    (r"gb300", "gb300"),
    (r"gb200", "gb200"),
    (r"b300", "b300"),
    (r"b200", "b200"),
    (r"h200", "h200"),
    (r"h100|h800|hopper", "h100-80"),
    (r"a100|ampere", "a100-80"),
    (r"v100", "v100-32"),
    (r"a3\b|910c|910_93|cloudmatrix", "ascend-910c"),
    (r"910b|ascend npu|a2\b", "ascend-910b"),
)


def hardware_of(row: Mapping[str, str]) -> Hardware:
    """The machine that a row names. Raises UserError for one that has no description."""
    text = row["hardware"].lower()
    for pattern, key in HARDWARE:
        if re.search(pattern, text):
            return load(key)
    raise UserError(f"hardware {row['hardware']!r}: no description")


def _dtype(row: Mapping[str, str], hardware: Hardware) -> str:
    text = row["precision"].lower()
    if "fp4" in text and FP4 in hardware.peak:
        return FP4
    if "fp8" in text or "float8" in text or "fp4" in text:
        return FP8 if FP8 in hardware.peak else "bfloat16"
    return "float16" if text.startswith("fp16") or "bfloat16" not in hardware.peak else "bfloat16"


def number(row: Mapping[str, str], name: str) -> int | None:
    """The whole number in a column, None where it is empty."""
    text = row.get(name, "")
    return int(float(text)) if text else None


def cases_of(row: Mapping[str, str]) -> Iterator[Case]:
    """All cases of a row. Raises UserError for a model or machine that is not known."""
    model, hardware, habits = model_of(row), hardware_of(row), habits_of(row)
    tp, pp, cp = (number(row, name) or 1 for name in ("tp", "pp", "cp"))
    devices, dp = number(row, "n_dev"), number(row, "dp")
    if not row["tp"] and not row["pp"]:
        tp, pp = _unsaid(row)
    elif row["tp"] and not row["pp"] and devices:
        least = 8 * count_parameters(model)["total"] / tp / (0.8 * hardware.memory.value)
        for pp in _pipelines(model.layers, devices // (tp * cp), number(row, "gbs"), least=least):
            yield from _with_mesh(row, model, hardware, habits, tp=tp, pp=pp, cp=cp, dp=devices // (tp * cp * pp))
        return
    if dp is None:
        # Where the number of devices is not told, sharding of the optimizer alone depends on it; no time is predicted.
        dp = max(8, (number(row, "ep") or 1)) if devices is None else max(1, devices // (tp * pp * cp))
    yield from _with_mesh(row, model, hardware, habits, tp=tp, pp=pp, cp=cp, dp=dp)


def _pipelines(layers: int, ranks: int, batch: int | None, *, least: float) -> list[int]:
    """Depths that the row leaves open: even, at `least` so deep, which is 8 bytes a parameter in the device's memory."""
    found = [pp for pp in range(1, ranks + 1) if layers % pp == 0 and ranks % pp == 0 and pp > least]
    return [pp for pp in found if not batch or batch % (ranks // pp) == 0]


def _with_mesh(
    row: Mapping[str, str], model: ModelConfig, hardware: Hardware, habits: Habits, *, tp: int, pp: int, cp: int, dp: int
) -> Iterator[Case]:
    seq, batch = number(row, "seq") or 2048, number(row, "gbs")
    virtual = _virtual(row, model.layers, pp)
    ep = (number(row, "ep") or 1) * (tp if "extend-EP" in row["notes"] else 1)
    whole_experts = re.search(r"bridge|modelzoo|etp1|extend", f"{row['source']} {row['model']} {row['notes']}", re.IGNORECASE)
    etp = tp if model.ffn.kind == "moe" and not (whole_experts and ep > 1) and dp * cp % ep == 0 else 1
    schedule = "dualpipev" if "dualpipev" in row["model"] else "auto"
    shard, recompute = row["shard"].lower(), recompute_of(row, habits)
    shard = "zero3" if shard.startswith("fsdp") else next((z for z in ("zero1", "zero2", "zero3") if z in shard), "none")
    for micro in _micro_batches(row, dp, batch):
        micros = max(1, (batch or 16 * pp * dp * micro) // (dp * micro))
        if habits.name == "torchtitan" and pp > 1:  # `mbs` is the batch of a rank, cut in as many pieces as there are stages
            micro, micros = max(1, micro // pp), micros * pp
        for v in virtual:
            yield Case(
                model=model, hardware=hardware, habits=habits, seq_len=seq, micro_batch=micro, micros=micros, tp=tp, pp=pp,
                virtual=v, cp=cp, ep=ep, etp=etp, dp=dp, shard=shard, recompute=recompute, schedule=schedule, dtype=_dtype(row, hardware),
                layers=layers_of(row, habits, model, stages=pp * v, ranks=pp), recomputed=_recomputed(row, model.layers // pp),
                cp_kind=row.get("cp_kind") or "ring", imbalance=1.0 if "force-balanced" in row["notes"] else None,
                offload=frozenset({"optimizer"} if "swap-optimizer" in row["notes"] else ()) | frozenset(
                    {"activations"} if "swap-attention" in row["notes"] else ()),
            )  # fmt: skip


def _recomputed(row: Mapping[str, str], blocks: int) -> float:
    """Share of the blocks that full recomputation covers: `full of 1 layer on each rank`."""
    found = re.search(r"full of (\d+) layer", row["recompute"])
    return min(1.0, int(found[1]) / max(1, blocks)) if found else 1.0


def _unsaid(row: Mapping[str, str]) -> tuple[int, int]:
    """A mesh for rows that name none: of those with tp 8, the pipeline that divides every one of the source's device counts."""
    return (8, 4) if (number(row, "n_dev") or 0) >= 64 else (1, 1)


def _micro_batches(row: Mapping[str, str], dp: int, batch: int | None) -> list[int]:
    said = number(row, "mbs")
    return [said] if said else [m for m in (1, 2, 4) if not batch or batch % (dp * m) == 0] or [1]


def _virtual(row: Mapping[str, str], layers: int, pp: int) -> list[int]:
    said = number(row, "vpp")
    if pp == 1:
        return [1]
    if "dualpipev" in row["model"] or (not said and "interleaved" in row["notes"].lower()):
        return [2]
    if said:
        return [max(1, min(said, -(-layers // pp)))]
    stated = "mbs, vpp not stated" in row["notes"] or not row["mbs"]
    return [v for v in range(1, 25) if layers % (pp * v) == 0] or [1] if stated else [1]
