"""The tensors of a Hugging Face folder, opened but not read: names, shapes, and parts of them on demand."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtrain.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredTensors:
    """Memory maps of one `model.safetensors`, or of the files that its index lists; a context manager.

    Raises:
        UserError: no safetensors (a pickle is refused), a file of the index is missing, a file is cut short or no safetensors file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for file, listed in self._listing().items():
            held = set(self._open(file).keys())
            if listed is not None and not listed <= held:
                absent = sorted(listed - held)
                raise UserError(f"{self.folder / file} lacks {', '.join(absent[:5])}, which {INDEX} says it holds")
            self._where |= dict.fromkeys(held if listed is None else listed, file)

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()

    @property
    def names(self) -> set[str]:
        """Names of all tensors, as stored."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads nothing."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Number format of a tensor as safetensors writes it, e.g. BF16."""
        return self._slice(name).get_dtype()

    def whole(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self._files[self._where[name]].get_tensor(name)

    def part(self, name: str, ranges: list[tuple[int, int]]) -> torch.Tensor:
        """Elements first to last (exclusive) along every dim; only these are read."""
        return self._slice(name)[tuple(slice(first, last) for first, last in ranges)]

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            self._files[file] = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but {INDEX} lists it; fetch the missing file") from None
        except SafetensorError as error:
            raise UserError(f"{path} is cut short or no safetensors file ({error}); fetch it again") from None
        return self._files[file]

    def _listing(self) -> dict[str, set[str] | None]:
        """File -> the tensors that the index says it holds, None if there is no index. A single file comes first, as in transformers."""
        if (self.folder / SINGLE).is_file():
            return {SINGLE: None}
        index = self.folder / INDEX
        if not index.is_file():
            raise UserError(self._nothing())
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str] | None] = {}
            for name, file in table.items():
                if Path(file).name != file:
                    raise ValueError(f"file name {file!r}")
                files.setdefault(file, set()).add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors files: {error!r}") from None
        return files

    def _nothing(self) -> str:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder} holds {pickles[0]}, a pickle, which may run any code when it is read, and no safetensors; "
                "load it with transformers where you trust it and save_pretrained() it as safetensors"
            )
        what = f"neither {SINGLE} nor {INDEX}" if self.folder.is_dir() else "no folder"
        return f"{self.folder}: {what}; a Hugging Face model is a folder with config.json and safetensors files"
