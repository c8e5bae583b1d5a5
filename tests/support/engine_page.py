"""The page of parity under the engines that are packages of their own, out of what their tests have printed."""

import os
import platform
from collections.abc import Iterable
from datetime import date

import torch
from commit import commit_name
from engine_parity import LINE

from llmtrain.packages import installed_version

FACTOR = 5.0
"""Times a control run's difference."""
PAGE = """# Parity: other engines against one native process

Written by `make parity-engines` on {date} from commit {commit}: {count} rows, {failed} failed. Python {python}, PyTorch {torch}, DeepSpeed
{deepspeed}, megatron-core {megatron}, {cores} cores ({machine}), gloo. Do not edit; the rows are those of the tests that the headings name.

Every row trains the tiny transformer of [the parity matrix](parity.md), and is compared with one process of the engine native that has the
same weights and batches. Both engines have no float64, so all of this is float32, and a bound is what rounding does to the same training:

- **loss**: largest relative difference of any step's loss. DeepSpeed: 20 steps; it may be {factor:g} times that of a control run (one
  native process, the rows of each step in another order). megatron-core: 8 steps; {factor:g} times that of the control, or of a native
  process whose initial weights were moved by a unit of rounding (largest of three): its collectives change sums inside every product.
- **gradient**: the largest difference of any whole gradient of step 1, parameter by parameter, relative to its norm; under megatron-core,
  which does not sum in our order, to a thousandth of the largest one's at least. DeepSpeed: {factor:g} times the control's; megatron-core:
  a fixed bound.
- **norm**: the same of the global norm, by which gradients are clipped; of all steps, and of step 1 under megatron-core.

In mixtures of experts every choice of step 1 is that of one process, and under megatron-core loads, entropies, balance losses and norms of
biases are as well (to 1e-5). Losses of a mixture of experts prove little by themselves in float32, as the matrix says: gradients carry
them.
{sections}
## Broken on purpose

The same comparison fails when one thing is wrong. DeepSpeed: each rank divides by its own number of targets (`test_deepspeed_sameness.py`).
megatron-core (`tests/support/megatron_faults.py`): one norm's gradient is not summed over tp; one cut projection is taken for a whole one;
experts are taken for dense layers. Each is seen in the quantities that it changes, and in no other gradient.
"""
HEADINGS = {
    "test_deepspeed_sameness": "DeepSpeed (`tests/engines/test_deepspeed_sameness.py`): 2 ranks unless it says 4",
    "test_megatron": "megatron-core (`tests/engines/test_megatron.py`)",
}


def page(reports: Iterable) -> str:
    """The page of pytest's `reports` of calls."""
    rows: dict[str, dict[str, tuple[bool, dict[str, tuple[float, float]]]]] = {name: {} for name in HEADINGS}
    for report in reports:
        test = report.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
        for line in filter(None, map(LINE.match, report.capstdout.splitlines())):
            _, measures = rows[test].setdefault(line["row"], (report.passed, {}))
            allowed = float(line["number"]) * (FACTOR if line["against"] == "control" else 1.0)
            measures[line["measure"]] = float(line["found"]), allowed
    passed = [good for of in rows.values() for good, _ in of.values()]
    return PAGE.format(
        date=date.today().isoformat(),
        commit=commit_name("tests/engines"),
        count=len(passed),
        failed=len(passed) - sum(passed),
        python=platform.python_version(),
        torch=torch.__version__,
        deepspeed=installed_version("deepspeed") or "absent",
        megatron=installed_version("megatron-core") or "absent",
        cores=len(os.sched_getaffinity(0)),
        machine=platform.machine(),
        factor=FACTOR,
        sections="".join(f"\n## {HEADINGS[name]}\n\n{_table(of)}\n" for name, of in rows.items() if of),
    )


def _table(rows: dict) -> str:
    head = ["row", *(cell for measure in ("loss", "gradient", "norm") for cell in (measure, "allowed")), ""]
    lines = [head, ["---"] * len(head)]
    for name, (good, measures) in rows.items():
        cells = [f"{number:.1e}" for measure in ("loss", "gradient", "norm") for number in measures[measure]]
        lines.append([name, *cells, "pass" if good else "**FAIL**"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
