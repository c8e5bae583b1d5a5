"""Published rows of speed and memory: what was run, as a `Case`, and what was measured.

Columns are those of `data/published.csv`, which says where every row comes from. A row that leaves out its micro-batch or its virtual
stages is taken to be run as this model finds best: published rows are of tuned runs.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware, load
from llmtrain.simulate.case import FP8, Case, Habits
from llmtrain.simulate.frameworks import habits_of, recompute_of
from llmtrain.simulate.memory import memory
from llmtrain.simulate.shapes import model_of

DATA = Path(__file__).parent / "data" / "published.csv"
GATED = ("file", "image", "paper-text")
"""Provenances that are fitted and gated; others are shown alone."""

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
CAUSAL = re.compile(r"bridge|modelzoo", re.IGNORECASE)
"""Sources that count the keys which a token sees; others count all (`plan` names both conventions)."""


@dataclass(frozen=True)
class Published:
    """One row: its case, or why there is none."""

    row: Mapping[str, str]
    cases: tuple[Case, ...]
    """One, or all that the row leaves open."""
    reason: str = ""

    @property
    def id(self) -> str:
        """Its number in the file."""
        return self.row["id"]

    @property
    def source(self) -> str:
        """As the file names it."""
        return self.row["source"]

    @property
    def family(self) -> str:
        """What is left out together: all tables and figures of one publication or repository's benchmark."""
        return family_of(self.source)

    @property
    def gated(self) -> bool:
        """Whether the row may be fitted or gate a check."""
        return self.row["provenance"] in GATED

    @property
    def seconds(self) -> float | None:
        """Of a step as measured, or derived from what the row gives; None where it gives no speed or no case."""
        return self.seconds_of(self.cases[0]) if self.cases else None

    def seconds_of(self, case: Case) -> float | None:
        """The same for one of its cases: a rate per device is one of tokens, of which a step has more or fewer."""
        return measured_seconds(self.row, case)


def family_of(source: str) -> str:
    """`Korthikanti et al. 2022 Fig. 7` -> `Korthikanti et al. 2022`: a table and a figure of one publication are one source."""
    name = re.sub(r"\s*\(.*?\)", "", source)
    name = re.sub(r"\s+(figure|Table.*|Fig\..*|weak scaling|strong scaling|long context|best practice.*)$", "", name)
    return re.sub(r"(performance summary).*", r"\1", name).strip()


def read(path: Path = DATA) -> list[Published]:
    """Every row of a file. Raises UserError for one that has not the columns of `data/published.csv`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"id", "source", "provenance", "model", "hardware", "framework", "tok_s_dev", "step_s"} - set(rows[0] if rows else ())
    if missing:
        raise UserError(f"{path}: columns {', '.join(sorted(missing))} are missing; they are those of {DATA.name}")
    return [_published({name: (value or "").strip() for name, value in row.items() if name}) for row in rows]


def _published(row: Mapping[str, str]) -> Published:
    try:
        cases = tuple(_cases(row))
        return Published(row, cases, "" if cases else "no mesh fits what the row says")
    except (UserError, ValueError, KeyError, ZeroDivisionError) as error:
        return Published(row, (), " ".join(str(error).split())[:160])


def hardware_of(row: Mapping[str, str]) -> Hardware:
    """The machine that a row names. Raises UserError for one that has no description."""
    text = row["hardware"].lower()
    for pattern, key in HARDWARE:
        if re.search(pattern, text):
            return load(key)
    raise UserError(f"hardware {row['hardware']!r}: no description")


def _dtype(row: Mapping[str, str], hardware: Hardware) -> str:
    text = row["precision"].lower()
    if text.startswith(("fp8", "mxfp8", "nvfp4")):
        return FP8 if FP8 in hardware.peak else "bfloat16"
    return "float16" if text.startswith("fp16") or "bfloat16" not in hardware.peak else "bfloat16"


def _number(row: Mapping[str, str], name: str) -> int | None:
    text = row.get(name, "")
    return int(float(text)) if text else None


def _cases(row: Mapping[str, str]) -> Iterator[Case]:
    model, hardware, habits = model_of(row), hardware_of(row), habits_of(row)
    tp, pp, cp = (_number(row, name) or 1 for name in ("tp", "pp", "cp"))
    devices, dp = _number(row, "n_dev"), _number(row, "dp")
    if not row["tp"] and not row["pp"]:
        tp, pp = _unsaid(row)
    elif row["tp"] and not row["pp"] and devices:
        least = 8 * count_parameters(model)["total"] / tp / (0.8 * hardware.memory.value)
        for pp in _pipelines(model.layers, devices // (tp * cp), _number(row, "gbs"), least=least):
            yield from _with_mesh(row, model, hardware, habits, tp=tp, pp=pp, cp=cp, dp=devices // (tp * cp * pp))
        return
    if dp is None:
        # Where the number of devices is not told, sharding of the optimizer alone depends on it; no time is predicted.
        dp = max(8, (_number(row, "ep") or 1)) if devices is None else max(1, devices // (tp * pp * cp))
    yield from _with_mesh(row, model, hardware, habits, tp=tp, pp=pp, cp=cp, dp=dp)


def _pipelines(layers: int, ranks: int, batch: int | None, *, least: float) -> list[int]:
    """Depths that the row leaves open: even, at `least` so deep, which is 8 bytes a parameter in the device's memory."""
    found = [pp for pp in range(1, ranks + 1) if layers % pp == 0 and ranks % pp == 0 and pp > least]
    return [pp for pp in found if not batch or batch % (ranks // pp) == 0]


def _with_mesh(
    row: Mapping[str, str], model: ModelConfig, hardware: Hardware, habits: Habits, *, tp: int, pp: int, cp: int, dp: int
) -> Iterator[Case]:
    seq, batch = _number(row, "seq") or 2048, _number(row, "gbs")
    virtual = _virtual(row, model.layers, pp)
    ep = (_number(row, "ep") or 1) * (tp if "extend-EP" in row["notes"] else 1)
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
                imbalance=1.0 if "force-balanced" in row["notes"] else None,
                offload=frozenset({"optimizer"} if "swap-optimizer" in row["notes"] else ()) | frozenset(
                    {"activations"} if "swap-attention" in row["notes"] else ()),
            )  # fmt: skip


def _unsaid(row: Mapping[str, str]) -> tuple[int, int]:
    """A mesh for rows that name none: of those with tp 8, the pipeline that divides every one of the source's device counts."""
    return (8, 4) if (_number(row, "n_dev") or 0) >= 64 else (1, 1)


def _micro_batches(row: Mapping[str, str], dp: int, batch: int | None) -> list[int]:
    said = _number(row, "mbs")
    return [said] if said else [m for m in (1, 2, 4) if not batch or batch % (dp * m) == 0] or [1]


def _virtual(row: Mapping[str, str], layers: int, pp: int) -> list[int]:
    said = _number(row, "vpp")
    if pp == 1:
        return [1]
    if "dualpipev" in row["model"]:
        return [2]
    if said:
        return [max(1, min(said, -(-layers // pp)))]
    stated = "mbs, vpp not stated" in row["notes"] or not row["mbs"]
    return [v for v in range(1, 25) if layers % (pp * v) == 0] or [1] if stated else [1]


def measured_seconds(row: Mapping[str, str], case: Case) -> float | None:
    """Seconds of a step; a speed per device or an MFU are turned into it by the source's own convention of counting FLOPs."""
    if row["step_s"]:
        return float(row["step_s"]) if _number(row, "n_dev") else None
    if row["tok_s_dev"]:
        return case.tokens / (float(row["tok_s_dev"]) * case.devices)
    flops = flops_per_token(case.model, case.seq_len, causal=bool(CAUSAL.search(row["source"])))
    rate = float(row["tflops_dev"]) * 1e12 if row["tflops_dev"] else None
    if rate is None and row["mfu_pct"] and row["peak_tflops"]:
        rate = float(row["mfu_pct"]) / 100 * float(row["peak_tflops"]) * 1e12
    return flops * case.tokens / (rate * case.devices) if rate else None


def model_flops_utilisation(case: Case, seconds: float, *, causal: bool = False) -> float:
    """Share of the peak, by one of the two conventions."""
    return flops_per_token(case.model, case.seq_len, causal=causal) * case.tokens / (seconds * case.devices * case.peak)


def memory_error(published: Published) -> float | None:
    """Mean of |predicted / measured - 1| over what a row gives of memory, in GiB; None where it gives nothing that is understood.

    `A|B|..` are ranks in order, so those of a pipeline's rank follow each other; `N% of none` is a share of the activations without
    recomputation; `params+opt A ; activations B` two quantities of the first stage.
    """
    text = published.row["mem_gib"]
    if not text or not published.cases:
        return None
    case = published.cases[0]
    ranks = memory(case)
    if "of none" in text:
        plain = case.with_(recompute=frozenset(), habits=replace(case.habits, tp_ranks_share_input=False))
        return abs(100 * ranks[0].activations / memory(plain)[0].activations / float(text.split("%")[0]) - 1)
    if "activations" in text:
        state, activations = (float(part.split()[-1]) for part in text.split(";"))
        first = ranks[0]
        held = (first.parameters + first.gradients + first.optimizer) / 2**30
        return (abs(held / state - 1) + abs(first.activations / 2**30 / activations - 1)) / 2
    measured = [float(part) for part in text.split("|")]
    if len(measured) == 1:
        one = ranks[-1] if "last rank" in published.row["mem_scope"] else max(ranks, key=lambda rank: rank.total)
        return abs(one.total / 2**30 / measured[0] - 1)
    errors = [abs(ranks[at * case.pp // len(measured)].total / 2**30 / value - 1) for at, value in enumerate(measured)]
    return sum(errors) / len(errors)
