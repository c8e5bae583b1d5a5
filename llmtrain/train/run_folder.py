"""The folder of one run: configuration, environment, metrics, logs, and the lock that keeps a second run out.

runs/NAME/{config.yaml, env.json, metrics.jsonl, log/rank-N.txt, checkpoints/, latest, report.md}
"""

import fcntl
import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from llmtrain.config.load import to_yaml
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError

PACKAGES = (
    "torch",
    "torch-npu",
    "numpy",
    "triton",
    "deepspeed",
    "megatron-core",
    "flash-attn",
    "apex",
    "transformers",
    "sentencepiece",
    "tokenizers",
)
"""Packages whose versions env.json records where they are installed."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "NCCL_ALGO", "SLURM_JOB_ID")
"""The only environment variables that env.json records; others may hold secrets."""

_SECRET = re.compile(r"(?i)(api[-_]?keys?|(?<!sample_)token|secrets?|passwords?|passwd|credentials?)$")


class RunFolder:
    """An open run folder; made by `create`, usable as a context manager that gives the lock back.

    `path` is the folder, `checkpoints` and `log` the folders below it, `metrics` the file metrics.jsonl.
    """

    def __init__(self, path: Path, lock: IO | None = None):
        self.path = path
        self.checkpoints, self.log, self.metrics = path / "checkpoints", path / "log", path / "metrics.jsonl"
        self._lock = lock

    @classmethod
    def create(cls, cfg: RunConfig) -> "RunFolder":
        """Open `cfg.output/cfg.name`, new or to be continued; every rank calls it, rank 0 does the work and holds the lock.

        config.yaml gets `cfg`; an earlier one that differs is kept as config.1.yaml, config.2.yaml, ... Raises `UserError`
        on every rank if the folder cannot be written or another run has it.
        """
        path = Path(cfg.output) / cfg.name
        lock = _first_rank_only(lambda: _open(path, cfg))
        return cls(path, lock)

    def truncate_metrics(self, step: int) -> int:
        """Drop what metrics.jsonl says of steps after `step`, and a last line that was cut short. Returns the lines dropped.

        Call it on rank 0 when a run goes on from `step`. The file is cut at one place, so a kill leaves it as before or as
        after, and a file handle that appends to it stays right.
        """
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        kept = next((index for index, line in enumerate(lines) if _beyond(line, step)), len(lines))
        if kept < len(lines):
            os.truncate(self.metrics, sum(map(len, lines[:kept])))
        return len(lines) - kept

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def setup_logging(folder: Path, rank: int, *, level: int = logging.INFO) -> None:
    """Send Python's `logging` of this rank to `folder/log/rank-N.txt`, and warnings of rank 0 to the console as well.

    `folder` is the run folder. Handlers of an earlier call are replaced; `warnings.warn` is captured too.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "_llmtrain", False)]:
        root.removeHandler(handler)
        handler.close()
    (folder / "log").mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / "log" / f"rank-{rank}.txt", encoding="utf-8")]
    handlers[0].setLevel(level)  # a library's logger may pass on more than the root logger's level
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if rank == 0:
        handlers.append(logging.StreamHandler())
        handlers[1].setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        handlers[1].setLevel(logging.WARNING)
    for handler in handlers:
        handler._llmtrain = True
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def environment(device: str) -> dict[str, Any]:
    """What env.json holds: versions, host, device, commit, command line, start time, and a few named variables."""
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(_without_secrets(sys.argv)),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "device": device,
        "ranks": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "llmtrain": _version("llmtrain"),
        "commit": _commit(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _open(path: Path, cfg: RunConfig) -> IO:
    """Rank 0: make the folder, take its lock, write what describes the run."""
    for folder in (path, path / "checkpoints", path / "log"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(path)
    try:
        _write_config(path, to_yaml(cfg))
        _replace(path / "env.json", json.dumps(environment(_device_name(cfg.device)), indent=2) + "\n")
    except OSError:
        lock.close()
        raise
    return lock


def _take_lock(path: Path) -> IO:
    lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until the run ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise UserError(f"run folder {path} is in use by {owner}; wait for that run, stop it, or choose another name (`--name`)") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _write_config(path: Path, text: str) -> None:
    current = path / "config.yaml"
    if current.exists():
        earlier = current.read_text(encoding="utf-8")
        if earlier == text:
            return
        number = next(n for n in range(1, 1_000_000) if not (path / f"config.{n}.yaml").exists())
        _replace(path / f"config.{number}.yaml", earlier)
    _replace(current, text)


def _replace(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _first_rank_only(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result there, None elsewhere; an error of it is raised on every rank."""
    distributed = dist.is_available() and dist.is_initialized()
    result, problem = None, None
    if not distributed or dist.get_rank() == 0:
        try:
            result = action()
        except (UserError, OSError) as error:
            problem = str(error) if isinstance(error, UserError) else f"the run folder cannot be written: {error} (`output`, `name`)"
    if distributed:
        shared = [problem]
        dist.broadcast_object_list(shared, src=0)
        problem = shared[0]
    if problem:
        raise UserError(problem)
    return result


def _beyond(line: bytes, step: int) -> bool:
    """Whether a line of metrics is of a later step, or no whole line."""
    if not line.endswith(b"\n"):
        return True
    try:
        return json.loads(line).get("step", 0) > step
    except (ValueError, AttributeError, TypeError):
        return True


def _device_name(name: str) -> str:
    if name in ("auto", "cuda", "npu") and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        module = torch.get_device_module(kind)
        return f"{kind}: {module.get_device_name()} x {module.device_count()}"
    return f"cpu: {platform.processor() or platform.machine()}"


def _without_secrets(argv: list[str]) -> list[str]:
    """The command line with the values of options that sound like secrets replaced."""
    shown, hide = [], False
    for argument in argv:
        option, equals, _ = argument.partition("=")
        sounds_secret = argument.startswith("-") and bool(_SECRET.search(option))
        shown.append("***" if hide else f"{option}=***" if sounds_secret and equals else argument)
        hide = sounds_secret and not equals
    return shown


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this code runs from, with `+` if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
