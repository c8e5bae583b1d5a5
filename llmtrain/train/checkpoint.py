"""Checkpoints of a run: saved beside the training, complete or absent, found again whatever happened in between."""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from llmtrain.config.train import CheckpointConfig
from llmtrain.train import checkpoint_files as files
from llmtrain.train import checkpoint_state as tensors
from llmtrain.train.checkpoint_files import CheckpointError
from llmtrain.train.checkpoint_state import State


@dataclass(frozen=True)
class _Saved:
    """One finished save: what the console is told, and the reason if it failed."""

    message: str
    failed: str | None


class Checkpointer:
    """Saves and finds the checkpoints of one run folder; every rank makes one and calls the same methods in the same order.

    Args:
        folder: the run folder. Checkpoints are `folder/checkpoints/step-00000100`, `folder/latest` links to the newest.
        cfg: when to save is the caller's business; `keep_last`, `keep_every`, `asynchronous` are obeyed here.
        log: takes one-line messages, on rank 0 only.
        timeout: seconds that a rank waits for another one while a checkpoint is written.
        writable: False for a tool that only reads: nothing is cleaned up, since another process may be saving there.
        stage: what copies a state before it is written; `stage.copy(state)` gives a mapping of the same names to CPU tensors.
    """

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig,
        *,
        log: Callable[[str], Any] = print,
        timeout: float = 1800.0,
        writable: bool = True,
        stage: tensors.Stage | None = None,
    ):
        self.folder, self.cfg = Path(folder), cfg
        self.checkpoints = self.folder / "checkpoints"
        self.failed: str | None = None
        """Why the last finished save failed, None if it did not; equal on every rank after `wait()`."""
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self._log = log if self.rank == 0 else lambda message: None
        self._group = None
        if self.world > 1:
            # A group of its own: on the training's groups the collectives of background writes would mix with the loop's.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc="checkpoint")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future | None = None
        self._finished: list[_Saved] = []
        self._stage = stage or tensors.Stage()
        if writable:
            self._on_rank_0(self._prepare)

    def save(self, step: int, state: State, meta: dict) -> None:
        """Save `state` and `meta` as the checkpoint of `step`.

        Returns when the state is copied, so that training may change it; `asynchronous: false` waits for the files as well.
        A save still being written is waited for. A failure is reported by `poll` and `failed`, on every rank, and the
        training goes on.

        Args:
            step: optimizer steps taken.
            state: name -> tensor; plain tensors are equal on every rank that has them, DTensors are sharded as they say.
            meta: what JSON can hold; rank 0's is stored.
        """
        meta_text = (json.dumps(meta, indent=1) + "\n").encode()
        self._wait_for_previous(step)
        started = time.monotonic()
        held = self._agree(lambda: tensors.held_by_all(state))
        same = all(names == held[0] for names in held)
        own = tensors.own_part(state, rank=self.rank if same else 0, world=self.world if same else 1)
        plan, staged = tensors.plan(own), self._stage.copy(own)
        if self.cfg.asynchronous:
            self._running = self._thread.submit(self._write, step, plan, staged, meta_text, started)
        else:
            self._finish(self._write(step, plan, staged, meta_text, started))

    def wait(self) -> None:
        """Return when nothing is being written any more; `failed` is then up to date."""
        if self._running is not None:
            self._finish(self._running.result())
            self._running = None

    def poll(self) -> list[str]:
        """One line for each save finished since the last call: the folder, seconds, bytes; or why it failed."""
        if self._running is not None and self._running.done():
            self.wait()
        finished, self._finished = self._finished, []
        return [saved.message for saved in finished]

    def newest(self) -> Path | None:
        """The most recent checkpoint whose files all are as they were written; damaged ones are reported and passed over."""
        self.wait()
        for path in self._on_rank_0(lambda: files.complete(self.checkpoints)):
            problems = self._damage(path)
            if not problems:
                return path
            self._log(f"checkpoint {path} is damaged ({'; '.join(problems)}); trying the one before")
        return None

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `checkpoint.resume` means: `auto`, `none`, or a checkpoint folder, which must be whole."""
        if resume == "none":
            return None
        if resume == "auto":
            return self.newest()
        path = Path(resume)
        self._on_rank_0(lambda: _require_complete(path, resume))
        if problems := self._damage(path.resolve()):
            raise CheckpointError(f"checkpoint.resume: {path} is damaged ({'; '.join(problems)}); name another one or `auto`")
        return path.resolve()

    def load(self, path: Path, state: State, *, weights_only: bool = False) -> dict:
        """Fill `state` in place from the checkpoint `path`, saved on any number of ranks with any sharding. Returns its meta.

        `weights_only` fills the weights and leaves the rest of `state` as it is; so does a checkpoint that holds weights alone
        (`weights_only` in its meta, as `llmtrain convert` writes it), whatever was asked.

        Raises `CheckpointError` when the names or shapes differ, or the format is another one. Files are checked by
        `newest` and `find`, not again here, but for the two small ones that say what there is.
        """
        path, contents = Path(path), []
        wanted = {name for names in self._agree(lambda: sorted(state)) for name in names}
        self._agree(lambda: contents.append(_contents(path, state, wanted, weights_only=weights_only)))
        metadata, state = contents[0]
        if changed := tensors.casts(state, metadata):
            self._log(f"checkpoint {path} holds {len(changed)} tensors in another dtype; converted: {changed[0]} ...")
        try:
            tensors.read(path, state, metadata, group=self._group, world=self.world)
        except CheckpointException as error:
            raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
        return json.loads((path / files.META).read_bytes())

    # Below: one save, from the background thread. Every step that can fail is agreed on by all ranks.

    def _write(self, step: int, plan, staged: State, meta: bytes, started: float) -> _Saved:
        final = self.checkpoints / files.step_name(step)
        partial = final.with_name(f"{final.name}.partial")
        try:
            self._on_rank_0(lambda: _fresh(partial))
            tensors.write(partial, plan, staged, group=self._group, world=self.world)
            mine = self._agree(lambda: {p.name: files.file_entry(p) for p in partial.glob(f"__{self.rank}_*")})
            size, notes = self._on_rank_0(lambda: self._complete(partial, final, step=step, meta=meta, shares=mine))
        except (Exception, CheckpointException) as error:  # whatever it is, the run goes on and the user is told
            return self._give_up(partial, step, _reason(error))
        seconds = time.monotonic() - started
        return _Saved("; ".join([f"saved {final} in {seconds:.1f} s, {size / 1e6:.1f} MB", *notes]), None)

    def _complete(self, partial: Path, final: Path, *, step: int, meta: bytes, shares: list[dict]) -> tuple[int, list[str]]:
        """Rank 0, all tensors written: manifest, name, link, retention. Returns the bytes and what else there is to say."""
        files.write_durably(partial / files.META, meta)
        entries = {name: files.file_entry(partial / name) for name in (files.META, ".metadata")}
        for share in shares:
            entries |= share
        serial = 1 + max((files.serial(path) or 0 for path in files.complete(self.checkpoints)), default=0)
        body = {"format": files.FORMAT, "step": step, "serial": serial, "files": entries}
        files.write_durably(partial / files.MANIFEST, files.render_manifest(body))
        files.sync(partial)
        files.publish(partial, final)
        return sum(entry["size"] for entry in entries.values()), self._tidy(final)

    def _tidy(self, final: Path) -> list[str]:
        """What comes after the checkpoint is complete and can no longer make it fail."""
        notes = []
        try:
            files.point(self.folder / "latest", final)
            files.retire(self.checkpoints, keep_last=self.cfg.keep_last, keep_every=self.cfg.keep_every)
        except OSError as error:
            notes.append(f"afterwards: {_reason(error)}")
        return notes

    def _give_up(self, partial: Path, step: int, reason: str) -> _Saved:
        message = f"checkpoint of step {step} failed: {reason}; training goes on, earlier checkpoints are untouched"
        if self.rank == 0 and partial.exists():
            try:
                files.delete(partial)
            except OSError as error:
                message += f"; {partial} could not be removed: {_reason(error)}"
        return _Saved(message, reason)

    def _finish(self, saved: _Saved) -> None:
        self._finished.append(saved)
        self.failed = saved.failed

    def _wait_for_previous(self, step: int) -> None:
        if self._running is None:
            return
        waiting = not self._running.done()
        started = time.monotonic()
        self.wait()
        if waiting:
            waited = time.monotonic() - started
            self._log(f"step {step} waited {waited:.1f} s for the previous checkpoint; raise checkpoint.every if this happens often")

    def _prepare(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for message in files.clean(self.checkpoints):
            self._log(message)

    def _damage(self, path: Path) -> list[str]:
        """Damage of `path`, each rank reading its share of the files; the same list on every rank."""
        shares = self._agree(lambda: files.damage(path, share=self.rank, shares=self.world))
        return list(dict.fromkeys(problem for share in shares for problem in share))

    def _agree(self, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank; its results by rank, or on every rank the first rank's error."""
        try:
            outcome = (action(), None)
        except Exception as error:  # another rank waits for this one's answer, whatever went wrong
            outcome = (None, error)
        outcomes = [outcome]
        if self.world > 1:
            outcomes = [None] * self.world
            dist.all_gather_object(outcomes, _plain(outcome), group=self._group)
        for rank, (_, error) in enumerate(outcomes):
            if error is not None:
                where = f" (rank {rank})" if self.world > 1 else ""
                kind = CheckpointError if isinstance(error, (OSError, CheckpointError)) else RuntimeError
                raise kind(_reason(error) + where) from error
        return [value for value, _ in outcomes]

    def _on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 only; its result, or its error, on every rank."""
        return self._agree(action if self.rank == 0 else lambda: None)[0]


def _plain(outcome: tuple[Any, Exception | None]) -> tuple[Any, Exception | None]:
    """An outcome that can be sent: an error of a class that may not survive the journey goes as its text."""
    value, error = outcome
    return (value, error if error is None or isinstance(error, (OSError, CheckpointError)) else RuntimeError(_reason(error)))


def _reason(error: BaseException) -> str:
    """One line that says why, from whatever DCP wrapped around it."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = next(iter(error.failures.items()))
        return _reason(inner) + (f" (rank {rank})" if rank or len(error.failures) > 1 else "")
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    text = str(error).strip() or type(error).__name__
    known = isinstance(error, (CheckpointError, RuntimeError))
    return (text if known else f"{type(error).__name__}: {text}").splitlines()[0]


def _fresh(partial: Path) -> None:
    if partial.exists():
        files.delete(partial)
    partial.mkdir(parents=True)


def _require_complete(path: Path, resume: str) -> None:
    if not path.is_dir():
        raise CheckpointError(f"checkpoint.resume: {resume} is no folder; give `auto`, `none` or a folder like checkpoints/step-00000100")
    if path.name.endswith(".partial"):
        raise CheckpointError(f"checkpoint.resume: {resume} was not written to its end; name a complete one or `auto`")
    if not (path / files.MANIFEST).is_file():
        raise CheckpointError(f"checkpoint.resume: {resume} has no {files.MANIFEST}, so it is no complete checkpoint of llmtrain")


def _trusted_manifest(path: Path) -> dict:
    """The manifest, after checking the two files that are read before any tensor."""
    manifest = files.read_manifest(path)
    for name in (".metadata", files.META):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path / files.MANIFEST} does not list {name}")
        if problem := files.file_damage(path, name, manifest["files"][name]):
            raise CheckpointError(f"checkpoint {path} is damaged ({problem})")
    return manifest


def _contents(path: Path, state: State, wanted: set[str], *, weights_only: bool) -> tuple[Metadata, State]:
    """The table of contents, once it is known to be whole, harmless, and to fit `state`; and the part of `state` to fill.

    `wanted` are the names of all ranks' states: a rank of a pipeline has some of them.
    """
    manifest = _trusted_manifest(path)
    metadata = tensors.read_metadata(path)
    stored = set(metadata.state_dict_metadata)
    if weights_only or json.loads((path / files.META).read_bytes()).get("weights_only"):
        state = {name: tensor for name, tensor in state.items() if name.endswith(".weight")}
        stored = {name for name in stored if name.endswith(".weight")}
    if problems := tensors.misfits(state, metadata, stored - (wanted - set(state))):
        raise CheckpointError(f"checkpoint {path} does not fit the run's model or optimizer: " + "; ".join(problems[:8]))
    named = {info.relative_path for info in metadata.storage_data.values()}
    if strange := sorted(named - set(manifest["files"])):
        raise CheckpointError(f"{path}/.metadata refused: it points to {strange[0]}, which is no file of this checkpoint")
    return metadata, state
