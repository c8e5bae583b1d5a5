"""How the checks see a machine: files below a root, an environment, commands. Tests put recorded outputs in their place."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

PATIENCE = 20.0  # seconds a tool gets: npu-smi can hang for ever with a driver that does not answer


AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class Verdict(str, Enum):
    """OK; worth knowing; or in the way of training."""

    OK = "OK"
    NOTE = "note"
    WRONG = "WRONG"


@dataclass(frozen=True)
class Line:
    """One line of the report. `fix` says what to do and goes with every WRONG."""

    group: str
    name: str
    verdict: Verdict
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.verdict is Verdict.WRONG and not self.fix:
            raise ValueError(f"{self.group}/{self.name} is WRONG without saying what to do")

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"group": self.group, "name": self.name, "verdict": self.verdict.value, "text": self.text, "fix": self.fix}


@dataclass(frozen=True)
class Answer:
    """What a command said. `code` is None where it does not exist, and -1 where it did not end in time."""

    code: int | None
    text: str = ""

    @property
    def found(self) -> bool:
        return self.code is not None

    @property
    def worked(self) -> bool:
        return self.code == 0


@dataclass(frozen=True)
class Machine:
    """The machine under examination."""

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: users_environment())

    def read(self, path: str) -> str | None:
        """A text file, `path` absolute; None if it cannot be read."""
        try:
            return self.at(path).read_text(errors="replace")
        except OSError:
            return None

    def at(self, path: str | Path) -> Path:
        """Where an absolute path is."""
        return self.root / str(path).lstrip("/")

    def run(self, command: Sequence[str], *, patience: float = PATIENCE) -> Answer:
        """Run a tool; its stdout and stderr together."""
        program = shutil.which(command[0], path=self.env.get("PATH"))
        if program is None:
            return Answer(None)
        try:
            done = subprocess.run(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**self.env, "LC_ALL": "C"},
                timeout=patience,
            )
        except subprocess.TimeoutExpired:
            return Answer(-1, f"no answer within {patience:.0f} s")
        except OSError as error:
            return Answer(-1, str(error))
        return Answer(done.returncode, done.stdout.decode(errors="replace"))


def users_environment(started_with: Path = Path("/proc/self/environ")) -> dict[str, str]:
    """The environment without llmtrain's own TORCH_DEVICE_BACKEND_AUTOLOAD=0, which would hide what plain `import torch` does."""
    env = dict(os.environ)
    if env.get(AUTOLOAD) == "0" and started_with.exists() and f"{AUTOLOAD}=0" not in started_with.read_bytes().decode().split("\0"):
        del env[AUTOLOAD]
    return env


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
