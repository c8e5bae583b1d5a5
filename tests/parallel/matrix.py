"""The whole parity matrix: `make parity` runs every row in float64 and float32 and writes docs/parity.md.

Ends with 1 if a row fails. `--only TEXT` runs the rows whose name has TEXT in it and prints them without writing the page; `--missing` runs
those that the page lacks and adds them to it.
"""

import argparse
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from commit import commit_name  # noqa: E402
from parity_rows import FAULTS, NUDGES, ROWS, Row, references  # noqa: E402
from sameness import FAULTS as BROKEN  # noqa: E402
from sameness import gradient_difference, loss_difference, norm_difference, routing_difference  # noqa: E402
from worlds import run_world  # noqa: E402

LOSS, GRADIENT, FACTOR = 1e-10, 1e-9, 5.0
PAGE = """# Parity: every mesh against one process

Written by `make parity` on {date} from commit {commit}: {count} rows, {failed} failed. Python {python}, PyTorch {torch}, {cores} cores
({machine}), gloo, {minutes:.0f} minutes. Do not edit; `tests/support/parity_rows.py` holds the rows, `tests/parallel/matrix.py` runs them.

Every row trains the same tiny transformer (3 layers unless it says 4, width 32, 4 heads, depth-scaled sandwich norm) for 20 steps of 8 rows
of 24 tokens, AdamW at a learning rate of 0.01, gradients clipped at norm 1, and is compared with one process that has the same weights and
batches.

- **Loss**: largest relative difference of any step's loss in float64; allowed {loss:.0e}.
- **Gradient**: largest difference of any whole gradient of step 1, relative to its norm, in float64; allowed {gradient:.0e}.
- **Norm**: largest relative difference of any step's gradient norm, by which gradients are clipped, in float64; allowed {gradient:.0e}.
- **Routing**: choices of experts in step 1, one per token and layer, that are those of one process; all must be.
- **float32 loss**: the same in float32. The **control** is one process with the 8 rows of each step in another order. It says too little:
  it changes the order of a few sums per step, where tp and cp change those inside every product. The **nudged** runs show what rounding
  does to this training: one process whose initial weights were each moved to a neighbouring float32 number, the largest difference of five.
  (Adam divides small gradients by their own size, and a mixture of experts may send a token elsewhere.) A mesh may differ by {factor:g}
  times the larger of the two; a star marks rows beyond {factor:g} times the control.

Float32 proves nothing by itself in the rows of a mixture of experts and of `4 layers`: there one unit of rounding in the initial weights
moves the loss by about 1e-3 (a token may go to another expert; the model of 4 layers is that sensitive), and a bound of {factor:g} times
that is too wide. It is float64 that carries these rows.

The engines that are packages of their own, DeepSpeed and megatron-core, have a [page of their own](parity-engines.md).

Rows are packed documents of random lengths, and ranks have different numbers of targets, unless it says one document a row. Micro-batches
hold 2 rows unless it says otherwise: a pipeline without data parallelism sees 4 of them a step.

| model | |
| --- | --- |
| GQA, MHA | 2 or 4 key/value heads; the others have 2 |
| tied | head and token embedding are one parameter |
| MTP | heads of multi-token prediction, 1 or 2 |
| MoE | 4 experts in each layer, each token goes to 2 |
| latent MoE | the same with a shared expert, and latent attention |
| balanced MoE | the same with a loss against unequal use of experts over all 8 rows of a step |
| DeepSeek | latent attention; a dense layer, then 8 experts in 4 groups, 2 of a token and a shared one; scores are sigmoids with a bias \
that moves every step; losses against unequal use over each row and against large logits; a head of multi-token prediction |
| BigMac | 4 experts with biases between two projections that they share: rows of width 8 travel |
| full groups | an expert takes its even share of 2 sequences and the rest is dropped; balanced by a loss over groups of 4, and by biases |
| GPT | learned positions, LayerNorm before each branch, GELU, biases |

{table}

## Broken on purpose

The same comparison with one reduction broken must fail, or it proves nothing. Each of these is seen by the loss, and by gradients or their
norm:

{faults}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the parity matrix; write docs/parity.md.")
    parser.add_argument("--only", help="run only rows whose name contains this; prints and writes nothing")
    parser.add_argument("--missing", action="store_true", help="run only rows and faults that the page lacks, and add them to it")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md")
    options = parser.parse_args()
    written = options.out.read_text() if options.missing else ""
    rows = [row for row in ROWS if (options.only is None or options.only in row.name) and line_start(row) not in written]
    everything = options.only is None and not options.missing
    faults = {name: row for name, row in FAULTS.items() if options.only is None and f"\n| {row.name} |" not in written}
    if not rows and not faults:
        parser.error(f"{options.out} has every row" if options.missing else f"no row's name contains {options.only!r}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of the processes of the worlds
    started, commit = time.monotonic(), commit_name("tests/parallel")
    runs = run_all(scenarios(rows, faults))
    verdicts = [Verdict.of(row, runs) for row in rows]
    seen = [fault_line(name, row, runs) for name, row in faults.items()]
    failed = [v for v in verdicts if not v.passed]
    if options.missing:
        options.out.write_text(with_faults(with_rows(written, verdicts, commit), [line for line, _ in seen]))
    elif everything:
        options.out.write_text(page(verdicts, [line for line, _ in seen], commit=commit, minutes=(time.monotonic() - started) / 60))
    if everything or options.missing:
        print(f"{options.out} written")
    else:
        print(table(verdicts))
    unseen = [line for line, found in seen if not found]
    print(f"{len(rows)} rows, {len(failed)} failed, {len(unseen)} faults not seen")
    for verdict in failed:
        print(f"failed: {verdict.row.name}{': ' + verdict.error if verdict.error else ''}")
    return 1 if failed or unseen else 0


def scenarios(rows: list[Row], faults: dict[str, Row]) -> dict[int, dict[str, dict]]:
    """Ranks -> name of a run -> what `sameness.train` is told."""
    worlds: dict[int, dict[str, dict]] = {1: {}}
    for row in [*rows, *faults.values()]:
        worlds[1] |= references(row)
    for row in rows:
        worlds.setdefault(row.shape.world, {}).update({f"{row.name} | {p}": row.scenario(p) for p in ("fp64", "fp32")})
    for name, row in faults.items():
        worlds.setdefault(row.shape.world, {})[f"fault {name}"] = row.scenario("fp64", fault=name)
    return worlds


# --- running ------------------------------------------------------------------------------------------------------------------------------


def run_all(worlds: dict[int, dict[str, dict]]) -> dict[str, dict | str]:
    """Every run by name; the reason in words in the place of one that failed."""
    progress, runs = Progress(sum(len(world) * ranks for ranks, world in worlds.items())), {}
    for ranks, left in sorted(worlds.items()):
        left = dict(left)
        while left:  # a run that fails ends its world; those after it get another one
            found, error = run_one_world(ranks, left, progress)
            runs |= found
            left = {name: scenario for name, scenario in left.items() if name not in found}
            if left:
                name = next(iter(left))
                left.pop(name)
                runs[name] = error or "its world ended without a result"
                progress.done(name, ranks, failed=True)
    return runs


def run_one_world(ranks: int, wanted: dict[str, dict], progress: "Progress") -> tuple[dict[str, dict], str | None]:
    """What `ranks` processes found until they ended, and the last words of one that failed."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        done, errors = Path(folder) / "done", []
        done.mkdir()

        def work() -> None:
            args = {"scenarios": wanted, "done": str(done)}
            try:
                run_world("sameness:train_all", ranks, args=args, folder=Path(folder), timeout=240 + 60 * len(wanted))
            except (AssertionError, subprocess.TimeoutExpired) as error:
                errors.append(last_words(str(error)))

        worker = threading.Thread(target=work)
        worker.start()
        running = True
        while running:
            worker.join(0.5)
            running = worker.is_alive()  # before the look at what is done: nothing comes after the last one
            for path in sorted(done.glob("*.pkl"), key=lambda p: int(p.stem)):
                name, found[name] = pickle.loads(path.read_bytes())
                path.unlink()
                progress.done(name, ranks)
    return found, errors[0] if errors else None


def last_words(text: str) -> str:
    """The last line of a failed rank's output that names an error."""
    lines = [line for line in text.splitlines() if "Error" in line]
    return (lines or text.splitlines() or ["no output"])[-1].strip()


class Progress:
    """A line for each run, with the time left; runs of more ranks are taken to be longer."""

    def __init__(self, work: int):
        self.work, self.finished, self.started = work, 0, time.monotonic()

    def done(self, name: str, ranks: int, *, failed: bool = False) -> None:
        self.finished += ranks
        seconds = time.monotonic() - self.started
        left = seconds / self.finished * (self.work - self.finished)
        print(f"{100 * self.finished / self.work:3.0f}%  ETA {left / 60:4.1f} min  {name}{'  FAILED' * failed}", flush=True)


# --- judging and writing --------------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """One row's figures."""

    row: Row
    loss: float = float("nan")
    gradient: float = float("nan")
    norm: float = float("nan")
    misrouted: int = 0
    choices: int = 0
    single: float = float("nan")
    control: float = float("nan")
    nudged: float = float("nan")
    error: str | None = None

    @classmethod
    def of(cls, row: Row, runs: dict[str, dict | str]) -> "Verdict":
        exact, single = runs[f"{row.name} | fp64"], runs[f"{row.name} | fp32"]
        alone, alone_32, control = (runs[f"{row.reference} | {kind}"] for kind in ("fp64", "fp32", "control"))
        nudges = [runs[f"{row.reference} | nudged {seed}"] for seed in NUDGES]
        if words := [run for run in (exact, single, alone, alone_32, control, *nudges) if isinstance(run, str)]:
            return cls(row, error=words[0])
        misrouted, choices = routing_difference(exact, alone)
        differences = loss_difference(exact, alone), gradient_difference(exact, alone), norm_difference(exact, alone)
        nudged = max(loss_difference(run, alone_32) for run in nudges)
        float_32 = loss_difference(single, alone_32), loss_difference(control, alone_32), nudged
        return cls(row, *differences, misrouted, choices, *float_32)

    @property
    def passed(self) -> bool:
        within = self.loss < LOSS and max(self.gradient, self.norm) < GRADIENT and self.misrouted == 0
        return self.error is None and within and self.control > 0 and self.single <= FACTOR * max(self.control, self.nudged)

    def cells(self) -> list[str]:
        routing = f"{self.choices - self.misrouted} of {self.choices}" if self.choices else ""
        numbers = (
            [f"{x:.1e}" for x in (self.loss, self.gradient, self.norm)],
            [f"{x:.1e}" for x in (self.single, self.control, self.nudged)],
        )
        numbers[1][0] += " *" * (self.single > FACTOR * self.control)
        result = "pass" if self.passed else "**FAIL**" + (f" {self.error}" if self.error else "")
        return [str(self.row.shape.world), self.row.mesh, self.row.model, self.row.details, *numbers[0], routing, *numbers[1], result]


def table(verdicts: list[Verdict]) -> str:
    head = ["ranks", "mesh", "model", "options", "loss", "gradient", "norm", "routing", "float32 loss", "control", "nudged", ""]
    lines = [head, ["---"] * len(head), *(verdict.cells() for verdict in verdicts)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def line_start(row: Row) -> str:
    """How the row's line in the table begins."""
    return f"| {row.shape.world} | {row.mesh} | {row.model} | {row.details} |"


def with_rows(text: str, verdicts: list[Verdict], commit: str) -> str:
    """A page with more rows, which were run at another commit."""
    if not verdicts:
        return text
    before, heading, after = text.partition("\n## Broken on purpose\n")
    failed = sum(not verdict.passed for verdict in verdicts)
    said = f"Run later, on {date.today().isoformat()} from commit {commit}: {len(verdicts)} rows, {failed} failed."
    return f"{before}\n{said}\n\n{table(verdicts)}\n{heading}{after}"


def with_faults(text: str, lines: list[str]) -> str:
    """A page with more faults below those that it has."""
    return text.rstrip("\n") + "".join(f"\n{line}" for line in lines) + "\n"


def fault_line(name: str, row: Row, runs: dict[str, dict | str]) -> tuple[str, bool]:
    """A line of the table of faults, and whether the fault was seen."""
    run, alone = runs[f"fault {name}"], runs[f"{row.reference} | fp64"]
    if isinstance(run, str) or isinstance(alone, str):
        return f"| {row.name} | {run if isinstance(run, str) else alone} | | | |", False
    loss, gradient, norm = (difference(run, alone) for difference in (loss_difference, gradient_difference, norm_difference))
    what: Callable | None = BROKEN[name]
    cells = row.name, (what.__doc__ or name).strip(), *(f"{x:.1e}" for x in (loss, gradient, norm))
    return f"| {' | '.join(cells)} |", loss > LOSS and max(gradient, norm) > GRADIENT


def page(verdicts: list[Verdict], faults: list[str], *, commit: str, minutes: float) -> str:
    return PAGE.format(
        date=date.today().isoformat(),
        commit=commit,
        count=len(verdicts),
        failed=sum(not verdict.passed for verdict in verdicts),
        python=platform.python_version(),
        torch=torch.__version__,
        cores=len(os.sched_getaffinity(0)),
        machine=platform.machine(),
        minutes=minutes,
        loss=LOSS,
        gradient=GRADIENT,
        factor=FACTOR,
        table=table(verdicts),
        faults="\n".join(["| row | what is broken | loss | gradient | norm |", "| --- | --- | --- | --- | --- |", *faults]),
    )


if __name__ == "__main__":
    sys.exit(main())
