"""Records of conversation files, each with the place that a message about it names."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.data.errors import DataError
from llmtrain.data.inputs import PACKED, InputFile, Piece, ReadOptions, expand
from llmtrain.data.readers import parquet_file, records


@dataclass(frozen=True)
class Record:
    """One record as it was read: a mapping of fields, or what is wrong with it."""

    where: str
    """`FILE:LINE`; in Parquet `FILE:row N`, in JSON `FILE:item N`, all from 1."""
    value: dict[str, Any] | DataError


def conversation_files(paths: Sequence[str]) -> list[InputFile]:
    """The files of paths, globs, URLs and folders (searched for .jsonl, .ndjson and .parquet).

    Raises:
        DataError: nothing there, an empty file, or a format that holds no records.
    """
    files = []
    for path in paths:
        whole = next((path.removesuffix(end) for end in PACKED if path.endswith(end)), path).endswith(".json")
        found = expand([path], ReadOptions(format="jsonl" if whole else "auto"))
        files += [replace(file, format="json") for file in found] if whole else found
    wrong = next((f for f in files if f.format == "text"), None)
    if wrong is not None:
        raise DataError(f"{wrong.path}: is text; conversations come as .jsonl, .ndjson, .json or .parquet")
    return files


def read_records(files: Sequence[InputFile]) -> Iterator[Record]:
    """Every record of the files, in order."""
    for file in files:
        try:
            yield from {"jsonl": _lines, "json": _items, "parquet": _rows}[file.format](file)
        except (OSError, EOFError) as error:
            raise DataError(f"{file.path}: cannot be read: {error}") from error


def _lines(file: InputFile) -> Iterator[Record]:
    for number, (_, line) in enumerate(records(Piece(file)), 1):
        if line.strip():
            yield Record(f"{file.path}:{number}", _parsed(line))


def _parsed(line: bytes) -> dict[str, Any] | DataError:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except RecursionError:
        return DataError("JSON nested too deeply")
    except ValueError as error:
        return DataError(f"not valid JSON: {error}")
    return _mapping(value)


def _mapping(value: Any) -> dict[str, Any] | DataError:
    return value if isinstance(value, dict) else DataError(f"a JSON object is wanted, this is a {type(value).__name__}")


def _items(file: InputFile) -> Iterator[Record]:
    """Of a list, or of the only list in a mapping."""
    with file.open() as stream:
        try:
            value = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.path}: not valid JSON: {error}; a record a line is .jsonl") from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(f"{file.path}: a list of records is wanted, this is a {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield Record(f"{file.path}:item {number}", _mapping(item))


def _rows(file: InputFile) -> Iterator[Record]:
    with file.open() as stream:
        number = 0
        for batch in parquet_file(file, stream).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{file.path}:row {number}", {name: value for name, value in row.items() if value is not None})
