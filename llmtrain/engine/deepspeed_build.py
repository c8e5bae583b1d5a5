"""Before DeepSpeed starts: its import for the right device, and what it compiles, with a word about it: `deepspeed_shm_comm` on a CPU,
`async_io` and `pin_memory` to offload to files.

torch builds such extensions once, in TORCH_EXTENSIONS_DIR (else a folder of this environment in ~/.cache/torch_extensions), behind a file
`lock` that whoever builds holds open. A build that is killed leaves the file there, and everybody after it would wait for ever, silently.
"""

import hashlib
import logging
import os
import shutil
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.compat import extension_folder
from llmtrain.device.base import Device
from llmtrain.errors import UserError
from llmtrain.parallel.mesh import Mesh

EVERY = 15.0
"""Seconds between words about a build."""
LIBAIO = (
    "the header libaio.h or the library is not on this machine. Debian, Ubuntu: apt-get install libaio-dev; openEuler, Fedora: "
    "dnf install libaio-devel"
)
COMPILERS = "Debian, Ubuntu: apt-get install g++; openEuler, Fedora: dnf install gcc-c++; conda: conda install gxx"


def prepare(mesh: Mesh, device: Device, *, swaps: bool = False, say: Callable[[str], Any] = print) -> None:
    """Import DeepSpeed for `device` and build what it needs; all ranks call it, one of each machine `say`s what takes long.

    swaps: what offloading to files needs too. Raises UserError, on every rank, without a compiler or libaio, for a lock that a killed build
    left behind, and if the build fails.
    """
    if device.kind == "npu" and "ASCEND_HOME_PATH" not in os.environ:
        raise UserError("engine deepspeed: ASCEND_HOME_PATH is not set, where DeepSpeed looks for CANN; source CANN's set_env.sh")
    os.environ.setdefault("DS_ACCELERATOR", device.kind)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if get_accelerator().device_name() != device.kind:
        raise UserError(f"engine deepspeed: DS_ACCELERATOR is {get_accelerator().device_name()}, but the run's device is {device.kind}")
    shared_memory = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if shared_memory is not None and deepspeed.ops.__compatible_ops__.get(shared_memory.NAME, False):
        _build(shared_memory, mesh, say=say)
    for name in ("PinMemoryBuilder", "AsyncIOBuilder") if swaps else ():
        builder = get_accelerator().create_op_builder(name)
        if any(mesh.gather(builder is None or not builder.is_compatible())):
            raise UserError(f"engine deepspeed: offloading to nvme needs DeepSpeed's {name.removesuffix('Builder')}, and {LIBAIO}")
        _build(builder, mesh, say=say)


def _build(builder: Any, mesh: Mesh, *, say: Callable[[str], Any]) -> None:
    import deepspeed

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own_folder(Path(deepspeed.__file__))))
    folder = extension_folder(builder.NAME)
    if found := next(filter(None, mesh.gather(obstacle(builder.NAME, folder))), None):
        raise UserError(f"engine deepspeed: {found}")
    speaks = int(os.environ.get("LOCAL_RANK", 0)) == 0 and not built(builder.NAME, folder)
    with _announced(builder.NAME, folder, files=len(builder.sources()), say=say if speaks else lambda text: None):
        try:
            builder.load()  # the first rank builds, the others wait for the lock
        except (RuntimeError, ImportError) as error:
            raise UserError(f"engine deepspeed: {builder.NAME} could not be built in {folder}: {_last_line(error)}") from error


def own_folder(package: Path) -> Path:
    """Where extensions of the DeepSpeed at this path are built: environments that share a folder would build anew whenever they take turns,
    and so would two versions of ninja, each of which takes what the other has built for old."""
    from torch.utils.cpp_extension import get_default_build_root

    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    return Path(get_default_build_root()) / f"deepspeed-{hashlib.sha256(f'{package.resolve()} {ninja}'.encode()).hexdigest()[:8]}"


def built(name: str, folder: Path) -> bool:
    """Whether the extension is there."""
    return (folder / f"{name}.so").is_file()


def obstacle(name: str, folder: Path) -> str | None:
    """What would keep the extension from being built and loaded, and what to do about it."""
    if left := left_behind(folder / "lock"):
        return left
    if built(name, folder):
        return None
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja") is None and shutil.which("ninja", path=scripts):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])  # a Python that was started by its path alone
    compiler = os.environ.get("CXX", "c++")
    what = f"DeepSpeed compiles {name} when it first needs it"
    if shutil.which(compiler.split()[0]) is None:
        return f"{what}, and there is no C++ compiler {compiler} (CXX names another). {COMPILERS}"
    if shutil.which("ninja") is None:
        return f"{what}, and there is no ninja: pip install ninja"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"{what}, and Python.h is not in {sysconfig.get_path('include')}. Debian, Ubuntu: apt-get install python3-dev"
    return None


def left_behind(lock: Path) -> str | None:
    """In words, if no process of this machine holds the lock any more; None without one, or where that cannot be known."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    if not Path("/proc/self/fd").is_dir() or any(_holds(process, lock) for process in Path("/proc").glob("[0-9]*")) or not lock.exists():
        return None
    return (
        f"{lock} has been there for {_words(age)} and no process of this machine holds it: a build was killed, and every start would wait "
        f"for it. Unless another machine that shares the folder is building, remove it: rm {lock}"
    )


def _holds(process: Path, file: Path) -> bool:
    try:
        return any(os.path.realpath(link) == os.path.realpath(file) for link in (process / "fd").iterdir())
    except OSError:  # of another user, or gone
        return False


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


@contextmanager
def _announced(name: str, folder: Path, *, files: int, say: Callable[[str], Any]) -> Iterator[None]:
    """Say that the extension is built, how far it is now and then, and how long it took."""
    started, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(EVERY):
            compiled = len(list(folder.glob("*.o")))
            say(f"building {name}: {time.monotonic() - started:.0f} s, {compiled} of {files} files compiled")

    say(f"building {name}, which DeepSpeed needs for this run, once for this machine and this torch, in {folder}")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
    say(f"built {name} in {time.monotonic() - started:.0f} s")


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines() or [type(error).__name__]
    return lines[0].strip()
