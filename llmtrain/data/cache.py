"""Arrays built once by whichever process comes first and shared by all of them as memory maps."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llmtrain.data.errors import DataError


def content_key(**settings: object) -> str:
    """A name for what follows from these settings: 20 hexadecimal digits of their hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if need be); the system drops it when the process dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_arrays(folder: Path, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Memory maps of the arrays in `folder`, which `build` makes if it is not there yet.

    One process builds under a lock, writes aside and renames; the others wait for it and then map the same files.

    Raises:
        DataError: `folder` cannot be written (option data.cache).
    """
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(folder.parent / f"{folder.name}.lock"):
                if not folder.is_dir():
                    _write(folder, build())
        except OSError as error:
            raise DataError(f"{folder}: the sample index cannot be written ({error.strerror}); set data.cache to another folder") from error
    return {file.stem: _open(file) for file in folder.glob("*.npy")}


def _open(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DataError(f"{file}: damaged sample index ({error}); delete {file.parent}, it is built anew") from error


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    aside = folder.parent / f"{folder.name}.{os.getpid()}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, array in arrays.items():
        np.save(aside / f"{name}.npy", array)
    aside.rename(folder)
