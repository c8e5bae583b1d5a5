"""Transcripts laid out as the ASCEND corpus has them: conversations in Mandarin and English, mixed (arXiv 2112.06223).

`ascend:FOLDER` reads FOLDER/train_metadata.csv; `ascend:FOLDER?split=train,test&language=mixed&normalise=yes` says more. The columns are
`transcription`, `language` (zh, en or mixed), `session_id`, and `path` (or `file_name`), whose names hold the line of the utterance:
ses1_spk2_L3_12.5_1.9.wav. The utterances of a session, in the order of these lines, one a line, make a document.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

from llmtrain.data.errors import DataError

ALIAS = "ascend:"
SPLITS, LANGUAGES = ("train", "validation", "test"), ("zh", "en", "mixed")
LINE = re.compile(r"_L(\d+)_")
COLUMNS = ("transcription", "language", "session_id")


def files(given: str) -> list[tuple[Path, str]]:
    """(metadata file, the choice of utterances) of `ascend:FOLDER[?...]`, a file per split.

    Raises:
        DataError: a word that is no option, a value that is not allowed, or no such file.
    """
    folder, _, query = given.removeprefix(ALIAS).partition("?")
    asked = _choice(query)
    paths = [Path(folder) / f"{split}_metadata.csv" for split in asked["split"].split(",")]
    for path in paths:
        if not path.is_file():
            raise DataError(f"input {given}: there is no {path}; a folder with {', '.join(f'{s}_metadata.csv' for s in SPLITS)} is wanted")
    return [(path, query) for path in paths]


def _choice(query: str) -> dict[str, str]:
    found = {"split": "train", "language": ",".join(LANGUAGES), "normalise": "no"}
    allowed = {"split": SPLITS, "language": LANGUAGES, "normalise": ("yes", "no")}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in found:
            raise DataError(f"{ALIAS} has no option {key!r}; allowed are {', '.join(found)}")
        wrong = next((word for word in value.split(",") if word not in allowed[key]), None)
        if wrong is not None:
            raise DataError(f"{ALIAS} {key}={value}: {wrong!r} is none of {', '.join(allowed[key])}")
        found[key] = value
    return found


def sessions(stream: BinaryIO, query: str, *, name: str) -> Iterator[str]:
    """The documents of a metadata file; `name` is what errors call it. Raises DataError for missing columns."""
    asked = _choice(query)
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
    missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise DataError(f"{name}: has no column {missing[0]!r}; it has {', '.join(map(repr, rows.fieldnames or ())) or 'none'}")
    found: dict[str, list[tuple[int | None, str]]] = {}
    for row in rows:
        if row["language"] in asked["language"].split(",") and (row["transcription"] or "").strip():
            text = row["transcription"].strip()
            found.setdefault(row["session_id"], []).append((_line(row), normalise(text) if asked["normalise"] == "yes" else text))
    for utterances in found.values():
        if all(line is not None for line, _ in utterances):
            utterances.sort(key=lambda entry: entry[0])
        yield "".join(f"{text}\n" for _, text in utterances)


def _line(row: dict[str, str]) -> int | None:
    found = LINE.search(row.get("path") or row.get("file_name") or "")
    return int(found[1]) if found else None


def normalise(text: str) -> str:
    """Without punctuation and symbols, in upper case, single spaces: what ASCEND's authors score."""
    plain = "".join(" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(plain.upper().split())
