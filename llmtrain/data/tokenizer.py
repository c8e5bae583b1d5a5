"""Tokenizers: sentencepiece `.model` and Hugging Face `tokenizer.json`, read by the libraries that own the formats."""

import hashlib
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from llmtrain.data.errors import DataError

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "<|eod|>")
"""Tokens that end a document, by the names that published tokenizers give them; the end-of-sequence token serves where none exists."""
MARK = re.compile(r"<\|[^|<> ]+\|>")
"""How symbols of one's own (`data tokenizer --symbol`) are written that serve as special tokens in a sentencepiece model."""
CHUNK = re.compile(r"(?:[^\n]*\n){1,8}|[^\n]+")
"""Eight lines: long enough for the library's batches, short enough for its merge queue to stay small."""


class Tokenizer(ABC):
    """Text to token ids and back. `encode` adds no special token."""

    path: Path
    """The file that was read."""
    vocab_size: int
    """Ids are below this."""
    bos_id: int | None
    eos_id: int | None
    eod_id: int
    """Ends every document."""
    special: Mapping[str, int]
    """Ids of the special tokens by name: what text is not made of, such as the ends of documents and turns."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of one text."""

    @abstractmethod
    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text, such as a chat template makes, in which the names of special tokens stand for these."""

    @abstractmethod
    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, one after another [sum of lengths] int32, and the length of each [texts] int64."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""

    @abstractmethod
    def piece(self, token: int) -> str:
        """How the vocabulary writes one token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts."""
        tokens, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])] if len(texts) else []

    def fingerprint(self) -> str:
        """Hash of the file's content: equal for equal vocabularies and merges of the same file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:20]

    def copy_to(self, folder: str | Path) -> Path:
        """Copy the file, and a `tokenizer_config.json` or `special_tokens_map.json` beside it, under the names that libraries look for."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / self.standard_name
        shutil.copyfile(self.path, target)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (beside := self.path.parent / name).is_file():
                shutil.copyfile(beside, folder / name)
        return target

    standard_name: str
    """File name under which `copy_to` stores it."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    standard_name = "tokenizer.model"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = path
        try:
            if not (content := path.read_bytes()):  # which the library would take for "no model given"
                raise RuntimeError("the file is empty")
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a sentencepiece model ({error}); set tokenizer.path or --tokenizer") from error
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        named = [i for i in map(self._model.piece_to_id, DOCUMENT_ENDS) if i not in (self._model.unk_id(), -1)]
        self.eod_id = _document_end(path, [*named, self.eos_id])
        pieces = enumerate(map(self.piece, range(self.vocab_size)))
        self.special = {name: i for i, name in pieces if self._model.is_control(i) or MARK.fullmatch(name)}
        self._special = re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")")
        self._lines_apart = self._lines_are_independent()

    def _lines_are_independent(self) -> bool:
        """Whether encoding line by line, which is faster, gives the same ids: text is taken as it is, and no piece spans a newline."""
        probe, model = " a  b \nc ", self._model
        plain = model.normalize(probe) == probe.replace(" ", "\u2581") and model.normalize("a") == "a"
        return plain and not any("\n" in model.id_to_piece(i) for i in range(self.vocab_size))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def encode_marked(self, text: str) -> list[int]:
        parts = self._special.split(text) if self.special else [text]
        return [i for part in parts if part for i in ([self.special[part]] if part in self.special else self.encode(part))]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        chunks = [CHUNK.findall(text) for text in texts] if self._lines_apart else [[text] for text in texts]
        parts = self._model.encode(list(chain.from_iterable(chunks)), out_type="numpy", num_threads=1)
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        ends = np.cumsum([0, *map(len, chunks)])
        before = np.concatenate([[0], np.cumsum(sizes)])
        return np.concatenate([np.zeros(0, np.int32), *parts]), np.diff(before[ends])

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(int(token))


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; a `tokenizer_config.json` beside it names the bos and eos tokens."""

    standard_name = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        self.path = path
        try:
            self._model = Library.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise DataError(
                f"{path}: not a tokenizer.json of the tokenizers library ({error}); set tokenizer.path or --tokenizer"
            ) from error
        self._model.no_padding()
        self._model.no_truncation()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.special = {token.content: i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        names = self._special_names()
        self.bos_id, self.eos_id = (self._model.token_to_id(names[n]) if n in names else None for n in ("bos_token", "eos_token"))
        ends = [self._model.token_to_id(name) for name in DOCUMENT_ENDS]
        self.eod_id = _document_end(path, [*ends, self.eos_id, self._model.token_to_id("</s>")])

    def _special_names(self) -> dict[str, str]:
        import json

        config = self.path.parent / "tokenizer_config.json"
        if not config.is_file():
            return {}
        try:
            given = json.loads(config.read_text(encoding="utf-8"))
            names = {n: given.get(n) for n in ("bos_token", "eos_token")}
            return {n: v["content"] if isinstance(v, dict) else v for n, v in names.items() if v}
        except (ValueError, AttributeError, KeyError) as error:
            raise DataError(f"{config}: not a tokenizer_config.json ({error!r}); mend it, or move it away from {self.path.name}") from error

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        return self.encode(text)  # the library finds the names itself

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [e.ids for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.fromiter(chain.from_iterable(parts), np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self._model.id_to_token(int(token)) or f"<id {token}>"


def _document_end(path: Path, candidates: Sequence[int | None]) -> int:
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise DataError(
        f"{path}: has no token to end a document with: neither an end-of-sequence token nor one of {', '.join(DOCUMENT_ENDS)}; "
        "name eos_token in a tokenizer_config.json beside it"
    )


KINDS = {"sentencepiece": SentencePieceTokenizer, "hf": HFTokenizer}


def load(path: str | Path, kind: str = "auto") -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a sentencepiece model, a `tokenizer.json`, or a folder that holds one of them (`tokenizer.json` first).
        kind: "sentencepiece", "hf", or "auto" to decide by the file.

    Raises:
        DataError: nothing there, or not readable as that kind.
    """
    if kind not in ("auto", *KINDS):
        raise DataError(f"tokenizer.kind {kind!r} is not one of auto, {', '.join(KINDS)}")
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path, kind)
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; set tokenizer.path or --tokenizer")
    if kind == "auto":
        with open(path, "rb") as file:
            kind = "hf" if path.suffix == ".json" or file.read(1) == b"{" else "sentencepiece"
    return KINDS[kind](path)


def _in_folder(folder: Path, kind: str) -> Path:
    json, models = folder / "tokenizer.json", sorted(folder.glob("*.model"))
    if kind != "sentencepiece" and json.is_file():
        return json
    if kind != "hf" and len(models) == 1:
        return models[0]
    wanted = {"hf": "tokenizer.json", "sentencepiece": "one .model file", "auto": "tokenizer.json or one .model file"}[kind]
    raise DataError(f"{folder}: does not hold {wanted} (it has {len(models)} .model files); set tokenizer.path or --tokenizer")
