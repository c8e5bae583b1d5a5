"""The host: Python, memory, disk, limits, NUMA, environment."""

import platform
import resource
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from llmtrain.hardware import cores
from llmtrain.tools.doctor.machine import Line, Machine, Verdict, gib

OLDEST_PYTHON = (3, 10)
SHOWN_VARIABLES = ("ASCEND_", "HCCL_", "NCCL_", "CUDA_", "GLOO_", "TORCH_", "PYTORCH_", "OMP_NUM_THREADS", "RANK_TABLE_FILE", "MASTER_")
SLOW = {"ASCEND_LAUNCH_BLOCKING": "1", "CUDA_LAUNCH_BLOCKING": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "NCCL_P2P_DISABLE": "1"}


def lines(machine: Machine, *, accelerator: bool) -> list[Line]:
    """The verdicts. accelerator: GPUs or NPUs are here, so that small /dev/shm and locked memory matter."""
    found = [_python(), *_memory(machine), *_shm(accelerator), *_disk(), *_limits(accelerator)]
    return [*found, _numa(machine), _host(), *_environment(machine)]


def _python() -> Line:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Line("host", "python", Verdict.WRONG, text, "Use Python 3.10 or newer")
    return Line("host", "python", Verdict.OK, text)


def _memory(machine: Machine) -> list[Line]:
    meminfo = machine.read("/proc/meminfo") or ""
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.endswith("kB")}
    if "MemTotal" not in values:
        return [Line("host", "memory", Verdict.NOTE, "unknown: /proc/meminfo cannot be read")]
    total, free = values["MemTotal"], values.get("MemAvailable", 0)
    text = f"{gib(total)}, {gib(free)} available"
    limit = (machine.read("/sys/fs/cgroup/memory.max") or machine.read("/sys/fs/cgroup/memory/memory.limit_in_bytes") or "max").strip()
    if limit.isdigit() and int(limit) < total:
        text += f"; this container may use {gib(int(limit))}"
    if free < 2**31:
        return [Line("host", "memory", Verdict.NOTE, f"{text}: little is left", "End what holds it: `ps aux --sort=-rss | head`")]
    return [Line("host", "memory", Verdict.OK, text)]


def _shm(accelerator: bool) -> list[Line]:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return []
    fix = "Docker: --shm-size=16g or --ipc=host; Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    if size >= 2**30:
        return [Line("host", "/dev/shm", Verdict.OK, gib(size))]
    verdict = Verdict.WRONG if accelerator else Verdict.NOTE
    return [Line("host", "/dev/shm", verdict, f"{gib(size)}: ranks of one machine exchange data there and will run out", fix)]


def _disk() -> list[Line]:
    found = []
    for name, folder in {"disk here": Path.cwd(), "disk for temporary files": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(folder).free
        text = f"{gib(free)} free at {folder}"
        if free < 2**28:
            fix = "Free some, or set `output` to another disk" if name == "disk here" else "Free some, or set TMPDIR"
            found.append(Line("host", name, Verdict.WRONG, text, fix))
        else:
            verdict = Verdict.NOTE if free < 5 * 2**30 else Verdict.OK
            found.append(Line("host", name, verdict, text + (": little for checkpoints" if verdict is Verdict.NOTE else "")))
    return found


def _limits(accelerator: bool) -> list[Line]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = []
    if 0 <= files < 4096:
        fix = f"`ulimit -n {most if most > files else 65536}` before starting"
        found.append(Line("host", "open files", Verdict.NOTE, f"limit {files}: many ranks or data files need more", fix))
    else:
        found.append(Line("host", "open files", Verdict.OK, f"limit {files}"))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if hasattr(resource, "RLIMIT_MEMLOCK") else resource.RLIM_INFINITY
    if locked == resource.RLIM_INFINITY:
        found.append(Line("host", "locked memory", Verdict.OK, "unlimited"))
    elif accelerator or Path("/dev/infiniband").exists():
        text = f"limit {gib(locked)}: RDMA between nodes needs unlimited"
        found.append(Line("host", "locked memory", Verdict.NOTE, text, "`ulimit -l unlimited`; Docker: --ulimit memlock=-1"))
    return found


def _numa(machine: Machine) -> Line:
    allowed = cores.allowed_cpus()
    machine_cores = cores.read_cores(allowed)
    nodes = sorted(path.name for path in machine.at("/sys/devices/system/node").glob("node[0-9]*"))
    quota = cores.cpu_quota()
    text = f"{len(machine_cores)} cores ({len(allowed)} logical CPUs) in {len(nodes) or 1} NUMA node(s)"
    if quota is not None:
        text += f"; the control group allows {quota:g} CPUs' time"
    return Line("host", "CPU", Verdict.OK, text)


def _host() -> Line:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        fix = "Set GLOO_SOCKET_IFNAME (and NCCL_/HCCL_SOCKET_IFNAME) to an interface, or add the name to /etc/hosts"
        return Line("host", "name", Verdict.NOTE, f"{name} resolves to no address: ranks elsewhere cannot find it by name", fix)
    return Line("host", "name", Verdict.OK, f"{name} is {address}")


def _environment(machine: Machine) -> list[Line]:
    shown = {name: value for name, value in sorted(machine.env.items()) if name.startswith(SHOWN_VARIABLES)}
    found = []
    if shown:
        found.append(Line("host", "environment", Verdict.OK, ", ".join(f"{name}={value}" for name, value in shown.items())))
    for name, value in SLOW.items():
        if machine.env.get(name) == value:
            found.append(Line("host", name, Verdict.NOTE, f"{name}={value} makes runs slow; it is for finding errors", f"unset {name}"))
    if "RANK_TABLE_FILE" in machine.env:
        text = "RANK_TABLE_FILE is set: HCCL then ignores the ranks that torchrun or llmtrain give it"
        found.append(Line("host", "RANK_TABLE_FILE", Verdict.NOTE, text, "unset RANK_TABLE_FILE"))
    return found
