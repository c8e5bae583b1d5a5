"""Which processor cores a rank runs on, and with how many threads. The launcher asks here too, so it needs no torch.

The machine is read from Linux's files; elsewhere (macOS, Windows) cores cannot be bound and the operating system's count is taken.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

CPUS, NODES, CGROUPS = "sys/devices/system/cpu", "sys/devices/system/node", "sys/fs/cgroup"


@dataclass(frozen=True)
class Core:
    """One physical core: its logical CPUs (hyperthreads) that this process may use, and its NUMA node."""

    cpus: tuple[int, ...]
    node: int = 0


@dataclass(frozen=True)
class Placement:
    """Where one rank runs."""

    cpus: frozenset[int]
    """Logical CPUs to bind to."""
    threads: int
    """Threads of an op."""
    note: str = ""
    """What stood in the way of one core per rank, or of all cores; for people."""


def allowed_cpus() -> frozenset[int]:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_cores(allowed: frozenset[int], root: Path = Path("/")) -> list[Core]:
    """The physical cores that `allowed` touches, by NUMA node and number. Without Linux's topology files every CPU is a core."""
    nodes = {cpu: int(path.name[4:]) for path in (root / NODES).glob("node[0-9]*") for cpu in parse_list(_read(path / "cpulist"))}
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in sorted(allowed):
        siblings = parse_list(_read(root / CPUS / f"cpu{cpu}/topology/thread_siblings_list")) or [cpu]
        mine = tuple(sibling for sibling in siblings if sibling in allowed)
        cores[mine] = Core(mine or (cpu,), nodes.get(cpu, 0))
    return sorted(cores.values(), key=lambda core: (core.node, core.cpus))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that control groups allow this process, the least of its group and those around it; None without a limit.

    cgroup v2: cpu.max is `QUOTA PERIOD`; v1: cpu.cfs_quota_us and cpu.cfs_period_us (kernel documentation, sched-bwc and cgroup-v2).
    """
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        bases = [CGROUPS] if not controllers else [f"{CGROUPS}/{controllers}", f"{CGROUPS}/cpu"]
        for base in bases:
            # A container sees its own group at the mount's root, while /proc names it as the host does.
            inner = Path(group.lstrip("/"))
            limits += [_limit(root / base / part) for part in (inner, *inner.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    if not quota or not period or quota in ("max", "-1"):
        return None
    return int(quota) / int(period)


def place(ranks: int, rank: int, *, cores: Sequence[Core], quota: float | None = None, nodes: Sequence[int | None] = ()) -> Placement:
    """Where rank `rank` of the `ranks` of this machine runs.

    The cores are dealt out in runs, in the order of NUMA nodes, so that ranks spread over nodes and hyperthreads of a core stay together.
    nodes: per rank the NUMA node of its accelerator, or None; ranks of one node share that node's cores. With more ranks than cores, ranks
    share a core. quota: see `cpu_quota`; a rank gets no more threads than its part of it.
    """
    near, group = list(cores), list(range(ranks))
    if len(nodes) == ranks and {core.node for core in cores} >= set(nodes):
        near = [core for core in cores if core.node == nodes[rank]]
        group = [other for other in range(ranks) if nodes[other] == nodes[rank]]
    mine, note = _share(near, len(group), group.index(rank))
    threads = len(mine)
    if quota is not None and quota / ranks < threads:
        threads = max(1, int(quota / ranks))
        note = f"the control group allows {quota:g} CPUs' time"
    return Placement(frozenset(cpu for core in mine for cpu in core.cpus), threads, note)


def _share(cores: list[Core], ranks: int, rank: int) -> tuple[list[Core], str]:
    if len(cores) < ranks:
        return [cores[rank * len(cores) // ranks]], f"{ranks} ranks share {len(cores)} cores"
    return cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks], ""


def pci_node(address: str, root: Path = Path("/")) -> int | None:
    """NUMA node of the PCI device `0000:1b:00.0`; None where the kernel does not know it."""
    text = _read(root / "sys/bus/pci/devices" / address / "numa_node").strip()
    return int(text) if text.isdigit() else None


def only_node(vendor: str, pci_class: str, root: Path = Path("/")) -> int | None:
    """NUMA node of all PCI devices of this vendor and class (`0x19e5`, `0x1200`); None where there is none or they are on several."""
    found = [path for path in (root / "sys/bus/pci/devices").glob("*") if _read(path / "vendor").strip() == vendor]
    nodes = {pci_node(path.name, root) for path in found if _read(path / "class").startswith(pci_class)}
    return nodes.pop() if len(nodes) == 1 else None


def bind(cpus: frozenset[int]) -> None:
    """Bind every thread of this process to `cpus`; threads started later inherit it. Does nothing where a system cannot bind."""
    if not hasattr(os, "sched_setaffinity"):
        return
    os.sched_setaffinity(0, cpus)
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # a thread may have ended meanwhile
            os.sched_setaffinity(int(task.name), cpus)


def wanted_threads(env: Mapping[str, str] = os.environ) -> int | None:
    """OMP_NUM_THREADS if the user set it: our launcher's value is not the user's, nor is the 1 that torchrun sets where there is none."""
    text = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not text.isdigit() or int(text) < 1 or env.get(OURS) == text:
        return None
    by_torchrun = text == "1" and "TORCHELASTIC_RUN_ID" in env and int(env.get("LOCAL_WORLD_SIZE", 1)) > 1
    return None if by_torchrun else int(text)


OURS = "LLMTRAIN_THREADS"
"""Environment variable by which the launcher says that it, not the user, set OMP_NUM_THREADS."""


def parse_list(text: str) -> list[int]:
    """Linux's list of numbers: `0-2,8` -> [0, 1, 2, 8]."""
    bounds = [part.split("-") for part in text.strip().split(",") if part.strip()]
    return [number for ends in bounds for number in range(int(ends[0]), int(ends[-1]) + 1)]


def format_list(numbers: Sequence[int] | frozenset[int]) -> str:
    """[0, 1, 2, 8] -> `0-2,8`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
