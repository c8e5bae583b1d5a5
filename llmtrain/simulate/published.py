"""Published rows of speed and memory: what was run, as a `Case`, and what was measured.

Columns are those of `data/published.csv`, which says where every row comes from. A row that leaves out its micro-batch or its virtual
stages is taken to be run as this model finds best: published rows are of tuned runs.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llmtrain.config.parameters import flops_per_token
from llmtrain.errors import UserError
from llmtrain.simulate.case import Case
from llmtrain.simulate.memory import memory, peak
from llmtrain.simulate.rows import cases_of, number
from llmtrain.simulate.scripts import completed

DATA = Path(__file__).parent / "data" / "published.csv"
GATED = ("file", "image", "paper-text")
"""Provenances that are fitted and gated; others are shown alone."""

CAUSAL = re.compile(r"bridge|modelzoo", re.IGNORECASE)
"""Sources that count the keys which a token sees; others count all (`plan` names both conventions)."""


NEEDED = {"id", "source", "provenance", "model", "hardware", "framework", "tok_s_dev", "step_s"}
"""Columns that a file must have; others may be left out."""


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
        reader = csv.DictReader(file)
        missing = NEEDED - set(reader.fieldnames or ())
        rows = [dict.fromkeys(_columns(), "") | row for row in reader]
    if missing:
        raise UserError(f"{path}: columns {', '.join(sorted(missing))} are missing; they are those of {DATA.name}")
    return [_published({name: (value or "").strip() for name, value in row.items() if name}) for row in rows]


@cache
def _columns() -> tuple[str, ...]:
    with DATA.open(newline="", encoding="utf-8") as file:
        return tuple(next(csv.reader(file)))


def _published(row: Mapping[str, str]) -> Published:
    try:
        cases = tuple(cases_of(completed(row)))
        if len(cases) > 1:  # of what is left open, what has room
            cases = tuple(case for case in cases if peak(case) <= case.hardware.memory.value) or cases
        return Published(row, cases, "" if cases else "no mesh fits what the row says")
    except (UserError, ValueError, KeyError, ZeroDivisionError) as error:
        return Published(row, (), " ".join(str(error).split())[:160])


def measured_seconds(row: Mapping[str, str], case: Case) -> float | None:
    """Seconds of a step; a speed per device or an MFU are turned into it by the source's own convention of counting FLOPs."""
    if row["step_s"]:
        return float(row["step_s"]) if number(row, "n_dev") else None
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
        one = ranks[0] if case.habits.name == "nanotron" else one  # its benchmark is printed by the first rank of all
        return abs(one.total / 2**30 / measured[0] - 1)
    errors = [abs(ranks[at * case.pp // len(measured)].total / 2**30 / value - 1) for at, value in enumerate(measured)]
    return sum(errors) / len(errors)
