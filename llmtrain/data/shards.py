"""One unit of tokenising: its documents become a pair of files per split, and a note of what was in them, written last."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np

from llmtrain.data.errors import DataError
from llmtrain.data.inputs import ReadOptions, Unit
from llmtrain.data.readers import Problems, documents
from llmtrain.data.token_file import TokenFile, TokenWriter, token_dtype
from llmtrain.data.tokenizer import Tokenizer, load

BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at once."""


@dataclass(frozen=True)
class Job:
    """What all units of one call share."""

    folder: Path
    """Where finished units lie."""
    tokenizer: str
    kind: str
    options: ReadOptions
    validation: float
    """Share of the documents that are set aside."""
    seed: int

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the outputs: "" alone, or "-train" and "-validation"."""
        return ("-train", "-validation") if self.validation else ("",)


@dataclass
class UnitReport:
    """What a finished unit holds."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    messages: tuple[str, ...] = ()


def unit_path(folder: Path, index: int) -> Path:
    """The prefix of a unit's files; `PREFIX.json` is written last."""
    return folder / f"unit-{index:06d}"


def finished(job: Job, index: int) -> UnitReport | None:
    """What an earlier call wrote of a unit; None if that is not complete, be it for a kill or a power cut, and must be done again."""
    prefix = unit_path(job.folder, index)
    try:
        report = UnitReport(**json.loads(Path(f"{prefix}.json").read_text()))
        tokens = sum(len(TokenFile(f"{prefix}{split}").tokens) for split in job.splits)
    except (FileNotFoundError, DataError, ValueError, TypeError):
        return None
    return report if tokens == report.tokens else None


def is_validation(text: str, *, share: float, seed: int) -> bool:
    """Whether a document is set aside: by the hash of its text, so that copies of a text are never on both sides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


def run_unit(job: Job, tokenizer: Tokenizer, index: int, unit: Unit) -> UnitReport:
    """Tokenise one unit, whose note is written when all else is."""
    prefix = unit_path(job.folder, index)
    problems, report = Problems(job.options.bad), UnitReport()
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(TokenWriter(f"{prefix}{split}", dtype, sync=False)) for split in job.splits]
        for batch in _batches(documents(unit, job.options, problems)):
            side = [is_validation(t, share=job.validation, seed=job.seed) if job.validation else False for t in batch]
            for writer, wanted in zip(writers, (False, True)):
                texts = [t for t, s in zip(batch, side) if s == wanted]
                report.tokens += _write(writer, tokenizer, texts)
                report.documents += len(texts)
    report.empty, report.bad, report.messages = problems.empty, problems.count, tuple(problems.messages)
    note = Path(f"{prefix}.json.part")
    note.write_text(json.dumps(asdict(report)))
    note.rename(f"{prefix}.json")
    return report


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(writer: TokenWriter, tokenizer: Tokenizer, texts: list[str]) -> int:
    tokens, lengths = tokenizer.encode_flat(texts)
    ended = np.insert(tokens, np.cumsum(lengths), tokenizer.eod_id)
    writer.add_many(ended, lengths + 1)
    return len(ended)


class Worker:
    """State of a worker process, which loads the tokenizer once."""

    job: Job
    tokenizer: Tokenizer

    @classmethod
    def start(cls, job: Job) -> None:
        """Called once in each process. The process ends with its parent, also if that is killed."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        threading.Thread(target=_end_with_parent, daemon=True).start()
        cls.job, cls.tokenizer = job, load(job.tokenizer, job.kind)

    @classmethod
    def run(cls, index: int, unit: Unit) -> UnitReport:
        """One unit."""
        return run_unit(cls.job, cls.tokenizer, index, unit)


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)
