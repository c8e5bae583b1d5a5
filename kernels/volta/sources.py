"""Where the CUDA sources are, and a folder for what has been compiled of them."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("args.cuh", "device.cuh", "tile.cuh", "attention.cu", "host_shim/device.h", "host_shim/shim.cpp")


def fingerprint(folder: Path, options: Iterable[object]) -> str:
    """Of the sources in `folder` and how they are compiled."""
    digest = hashlib.sha256(repr(list(options)).encode())
    for name in NAMES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:32]


def cache_folder() -> Path:
    """`llmtrain/volta` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrain" / "volta"


def cached(name: str, suffix: str, make: Callable[[], bytes]) -> Path:
    """The file of this name, made if it is not there. Processes that make it at once do not disturb each other."""
    path = cache_folder() / (name + suffix)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(make())
        partial.replace(path)
    return path
