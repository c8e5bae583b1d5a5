"""Checkpoints as files: names, checksums, the manifest, what is complete, what is kept. Knows nothing of tensors or ranks.

checkpoints/step-00000100/{.metadata, __RANK_0.distcp, meta.json, manifest.json}     complete
checkpoints/step-00000100.partial/                                                 being written, or being deleted
checkpoints/step-00000100.replaced/                                                the one before, while a new one takes its name
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from llmtrain.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
META = "meta.json"
CHUNK = 1 << 20
"""Bytes read at once while a file is checksummed."""

_COMPLETE = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that is missing, partial, damaged, of another format, or that does not fit the run."""


def step_name(step: int) -> str:
    """Name of the folder of optimizer step `step`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a complete checkpoint's name, None for any other name."""
    match = _COMPLETE.fullmatch(path.name)
    return int(match.group(1)) if match else None


def file_entry(path: Path) -> dict:
    """`{"size": bytes, "sha256": hex}` of a file, read as a stream."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            size += read
    return {"size": size, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def render_manifest(body: dict) -> bytes:
    """The manifest's bytes: `body` and a checksum over it, in the one form that `read_manifest` accepts."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(path: Path) -> dict:
    """The manifest of the checkpoint folder `path`: `{"format", "step", "serial", "files": {name: entry}}`.

    Raises `CheckpointError` when it is missing, when any of its bytes changed, or when its format is not this program's.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is not complete") from None
    try:
        body = json.loads(data)
        body.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(f"{file} is damaged: it is not a manifest") from None
    if render_manifest(body) != data:
        raise CheckpointError(f"{file} is damaged: its content does not match its own checksum")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{file} has checkpoint format {body.get('format')}; this version of llmtrain reads format {FORMAT}")
    return body


def file_damage(path: Path, name: str, entry: dict) -> str | None:
    """What is wrong with the file `name` of the checkpoint `path`, None if it is as the manifest says."""
    file = path / name
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            return f"{name}: {size} bytes, expected {entry['size']}"
        found = file_entry(file)["sha256"]
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    return None if found == entry["sha256"] else f"{name}: sha256 {found[:16]}..., expected {entry['sha256'][:16]}..."


def damage(path: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """Everything wrong with the checkpoint `path`, or with the `share`-th of `shares` equal parts of its files."""
    try:
        files = read_manifest(path)["files"]
    except CheckpointError as error:
        return [str(error)]
    largest_first = sorted(files, key=lambda name: (-files[name]["size"], name))
    found = (file_damage(path, name, files[name]) for name in largest_first[share::shares])
    return [problem for problem in found if problem]


def complete(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, most recently saved first (a run that went back has a newer one with a lower step).

    One whose manifest cannot be read comes first, since it may be the newest: `damage` says what is wrong with it.
    """

    def age(path: Path) -> tuple:
        number = serial(path)
        return (number is None, number or 0, step_of(path))

    found = [path for path in folder.iterdir() if step_of(path) is not None] if folder.is_dir() else []
    return sorted(found, key=age, reverse=True)


def serial(path: Path) -> int | None:
    """How many checkpoints were saved in this folder up to this one; None if its manifest cannot be read."""
    try:
        return read_manifest(path)["serial"]
    except CheckpointError:
        return None


def clean(folder: Path) -> list[str]:
    """Finish what a killed run left half done: put a replaced checkpoint back, delete partial ones. Returns messages."""
    messages = []
    for path in sorted(folder.glob("step-*.replaced")):
        if (folder / path.stem).exists():
            delete(path)
        else:
            path.rename(folder / path.stem)
            messages.append(f"checkpoint {folder / path.stem} put back: the run was killed while replacing it")
    for path in sorted(folder.glob("step-*.partial")):
        shutil.rmtree(path)
        messages.append(f"removed {path}: an earlier run was killed while writing it")
    return messages


def publish(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its name. At every moment the old one, the new one or a `.replaced` one is whole."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        delete(replaced)


def point(link: Path, target: Path) -> None:
    """Make the symbolic link `link` name `target`, in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


def delete(path: Path) -> None:
    """Delete a checkpoint; one that is deleted only in part never has a complete one's name."""
    if step_of(path) is not None:
        path = path.rename(path.with_name(f"{path.name}.partial"))
    shutil.rmtree(path)


def retire(folder: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete all but the `keep_last` newest checkpoints and the multiples of `keep_every`. Returns the deleted ones.

    Those with an unreadable manifest are neither counted nor deleted.
    """
    readable = [path for path in complete(folder) if serial(path) is not None]
    old: Iterable[Path] = (p for p in readable[keep_last:] if not (keep_every and step_of(p) % keep_every == 0))
    deleted = []
    for path in old:
        delete(path)
        deleted.append(path)
    return deleted
