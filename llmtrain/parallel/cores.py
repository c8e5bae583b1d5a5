"""Processor cores of the ranks: each of a machine's ranks gets its own, and as many threads."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from llmtrain.config.train import ParallelConfig
from llmtrain.hardware import cores
from llmtrain.parallel.mesh import Mesh


@contextmanager
def settled(cfg: ParallelConfig, *, mesh: Mesh) -> Iterator[str]:
    """Bind this rank to its cores and set its threads, as `parallel.affinity` and `parallel.threads` say; all ranks call it together.

    Yields what was chosen, in words, and puts threads and cores back at the end. Ranks whose allowed cores differ were bound by their
    launcher (srun, mpirun, numactl) and are left where they are. A single rank is never bound: it may use all its cores anyway.
    """
    before, threads = cores.allowed_cpus(), torch.get_num_threads()
    mine = (machine(), tuple(sorted(before)), mesh.device.numa_node())
    everyone = mesh.gather(mine) if mesh.world > 1 else [mine]
    neighbours = [rank for rank, (machine, _, _) in enumerate(everyone) if machine == mine[0]]
    placement, by_launcher = _place(mine, [everyone[rank] for rank in neighbours], neighbours.index(mesh.rank))
    notes = [placement.note] if placement.note else []
    if cfg.affinity == "auto" and len(neighbours) > 1 and not by_launcher:
        try:
            cores.bind(placement.cpus)
        except OSError as error:
            notes.append(f"cores cannot be bound: {error.strerror}")
    count, reason = _threads(cfg, placement)
    torch.set_num_threads(count)
    words = _words(mesh, by_launcher=by_launcher, notes=[*notes, *reason], neighbours=neighbours)
    try:
        yield words
    finally:
        torch.set_num_threads(threads)
        if cores.allowed_cpus() != before:
            cores.bind(before)


def _place(mine: tuple, everyone: Sequence[tuple], rank: int) -> tuple[cores.Placement, bool]:
    """This rank's placement among the ranks of its machine, and whether their launcher has bound them already."""
    by_launcher = any(cpus != mine[1] for _, cpus, _ in everyone)
    available, quota = cores.read_cores(frozenset(mine[1])), cores.cpu_quota()
    if by_launcher:
        return cores.place(1, 0, cores=available, quota=None if quota is None else quota / len(everyone)), True
    return cores.place(len(everyone), rank, cores=available, quota=quota, nodes=[node for _, _, node in everyone]), False


def _threads(cfg: ParallelConfig, placement: cores.Placement) -> tuple[int, list[str]]:
    if cfg.threads is not None:
        return cfg.threads, ["parallel.threads"]
    asked = cores.wanted_threads()
    return (placement.threads, []) if asked is None else (asked, ["OMP_NUM_THREADS"])


def _words(mesh: Mesh, *, by_launcher: bool, notes: list[str], neighbours: list[int]) -> str:
    """`0 | 1, 1 thread each`: cores of the ranks of this machine, what bound them, and what else decided."""
    mine = (cores.format_list(cores.allowed_cpus()), torch.get_num_threads())
    everyone = mesh.gather(mine) if mesh.world > 1 else [mine]
    sets, counts = zip(*(everyone[rank] for rank in neighbours))
    bound = "all ranks on " if len(sets) > 1 and len(set(sets)) == 1 else ""
    threads = "/".join(str(count) for count in dict.fromkeys(counts))
    plural = "" if threads == "1" else "s"
    each = " each" if len(sets) > 1 else ""
    notes = (["bound by the launcher"] if by_launcher else []) + notes
    extra = f" ({'; '.join(notes)})" if notes else ""
    return f"{bound}{' | '.join(dict.fromkeys(sets))}, {threads} thread{plural}{each}{extra}"


def machine() -> str:
    """The same for two processes if they share a kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()
