"""Documents out of files, and what is said of records that cannot be read."""

import csv
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from llmtrain.data import ascend
from llmtrain.data.corpora import heading_sections, scenes
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import WHOLE_FILE, InputFile, Piece, ReadOptions, Unit, delimiter

BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"


class Problems:
    """Bad records: raised at once, or counted with the first few messages kept."""

    def __init__(self, mode: str, *, mend: str = "mend it, or pass --bad skip", kept: int = 3) -> None:
        self.mode, self.count, self.messages, self._mend, self._kept = mode, 0, [], mend, kept
        self.empty = 0
        """Records without text, which are left out in any case."""

    def add(self, message: str) -> None:
        """Raise DataError, or count where bad records are skipped."""
        if self.mode == "fail":
            raise DataError(f"{message}; {self._mend}")
        self.count += 1
        if len(self.messages) < self._kept:
            self.messages.append(message)


def documents(unit: Unit, options: ReadOptions, problems: Problems) -> Iterator[str]:
    """The texts of a unit in order; records without any text are counted and left out."""
    for piece in unit.pieces:
        read = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "csv": _csv, "ascend": _ascend}[piece.file.format]
        try:
            for text in read(piece, options, problems):
                if text.strip():
                    yield text
                else:
                    problems.empty += 1
        except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{piece.file.path}: cannot be read: {error}") from error


def _text(piece: Piece, options: ReadOptions, problems: Problems) -> Iterator[str]:
    if piece.file.split not in WHOLE_FILE:
        for offset, record in records(piece):
            text = _decode(record, piece.file, offset, problems)
            if text is not None and text.strip():
                _refuse_windows_blank_lines(piece.file, text)
                yield text.strip("\r\n")
        return
    with piece.file.open() as stream:
        text = _decode(stream.read().removeprefix(BOM), piece.file, 0, problems)
    if text is not None and not text.strip():
        problems.add(f"{piece.file.path}: holds no text")
    elif text is not None:
        yield from {"file": lambda t: [t], "heading": heading_sections, "scene": scenes}[piece.file.split](text)


def _refuse_windows_blank_lines(file: InputFile, text: str) -> None:
    if file.split == "blank" and "\r\n\r\n" in text:
        raise DataError(f"{file.path}: has Windows line ends, between which --split blank sees no blank line; convert it to plain newlines")


def _jsonl(piece: Piece, options: ReadOptions, problems: Problems) -> Iterator[str]:
    for offset, record in records(piece):
        if not record.strip():
            continue
        text = _decode(record, piece.file, offset, problems)
        if text is None:
            continue
        value = _field(text, options.field)
        if isinstance(value, str):
            yield value
        else:
            problems.add(f"{piece.file.path}, line {line_number(piece.file, offset)}: {value.args[0]}")


def _field(line: str, name: str) -> str | DataError:
    """The text of one JSON line, or what is wrong with it."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return DataError("JSON nested too deeply")
    except ValueError as error:  # a number of more digits than Python converts
        return DataError(f"not readable JSON: {error}")
    if not isinstance(value, dict):
        return DataError(f"a JSON object is wanted, this is a {type(value).__name__}")
    if name not in value:
        return DataError(f"has no field {name!r} (--field); it has {', '.join(map(repr, value)) or 'none'}")
    text = value[name]
    if not isinstance(text, str):
        return DataError(f"field {name!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return DataError(f"field {name!r} holds half of a surrogate pair, which is no character")
    return text


def parquet_file(file: InputFile, stream: BinaryIO) -> object:
    """An open `pyarrow.parquet.ParquetFile`."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{file.path}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(stream)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.path}: not a readable Parquet file ({error})") from error


def _parquet(piece: Piece, options: ReadOptions, problems: Problems) -> Iterator[str]:
    with piece.file.open() as stream:
        table = parquet_file(piece.file, stream)
        names = table.schema_arrow.names
        if options.field not in names:
            raise DataError(f"{piece.file.path}: has no column {options.field!r} (--field); it has {', '.join(map(repr, names))}")
        for group in range(piece.start, piece.end):
            row = 0
            for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=[options.field]):
                for value in batch.column(0).to_pylist():
                    if isinstance(value, str):
                        yield value
                    else:
                        problems.add(
                            f"{piece.file.path}, row group {group}, row {row}: {options.field!r} is {type(value).__name__}, not a string"
                        )
                    row += 1


def _csv(piece: Piece, options: ReadOptions, problems: Problems) -> Iterator[str]:
    with piece.file.open() as stream:
        rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
        names = rows.fieldnames or ()
        if options.field not in names:
            raise DataError(f"{piece.file.path}: has no column {options.field!r} (--field); it has {', '.join(map(repr, names)) or 'none'}")
        for row in rows:
            if row[options.field] is None:
                problems.add(f"{piece.file.path}, line {rows.line_num}: the row ends before column {options.field!r}")
            else:
                yield row[options.field]


def _ascend(piece: Piece, options: ReadOptions, problems: Problems) -> Iterator[str]:
    with piece.file.open() as stream:
        yield from ascend.sessions(stream, piece.file.query, name=piece.file.path)


def records(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each record between delimiters; read in blocks, so that a file of any size passes through."""
    mark = delimiter(piece.file)
    with piece.file.open() as stream:
        if piece.start:
            stream.seek(piece.start)
        offset, left, held = piece.start, None if piece.end is None else piece.end - piece.start, b""
        while block := stream.read(BLOCK if left is None else min(BLOCK, left)):
            left = None if left is None else left - len(block)
            if offset == 0 and not held and block.startswith(BOM):
                offset, block = len(BOM), block[len(BOM) :]
            *whole, held = (held + block).split(mark)
            for record in whole:
                yield offset, record
                offset += len(record) + len(mark)
        if held:
            yield offset, held


def _decode(data: bytes, file: InputFile, offset: int, problems: Problems) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        problems.add(
            f"{file.path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {at}, line {line_number(file, at)} ({error.reason})"
        )
        return None


def line_number(file: InputFile, offset: int) -> int:
    """The line, from 1, that byte `offset` is in; reads the file up to it."""
    lines = 1
    with file.open() as stream:
        while offset > 0 and (block := stream.read(min(BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines
