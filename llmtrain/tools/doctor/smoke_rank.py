"""One rank of the collective test, in a process of its own: every collective that training uses, with results that are known.

Writes a JSON object to the file named by its argument: results, times, clock offsets of the nodes and, from rank 0, the lines of all nodes.
"""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmtrain import compat
from llmtrain.device import select

ROUNDS = 5
ELEMENTS = 1 << 20


def main() -> None:
    """`smoke_rank.py OUT DEVICE SECONDS [LINES]`."""
    out, kind, seconds, *rest = sys.argv[1:]
    device = select(kind, int(os.environ.get("LOCAL_RANK", 0)))
    if kind != "cpu":
        device.set_current()
    timeout = timedelta(seconds=float(seconds))
    dist.init_process_group(device.collective_backend, timeout=timeout, **device.process_group_options(timeout))
    result: dict[str, Any] = {"rank": dist.get_rank(), "world": dist.get_world_size(), "backend": device.collective_backend}
    try:
        result["collectives"] = collectives(device.torch_device)
        # Objects and clocks go by gloo: small messages of the hosts.
        group = dist.new_group(backend="gloo", timeout=timeout) if kind != "cpu" else None
        lines = json.loads(Path(rest[0]).read_text()) if rest else []
        nodes: list[Any] = [None] * result["world"]
        dist.all_gather_object(
            nodes, {"host": socket.gethostname(), "local": os.environ.get("LOCAL_RANK", "0"), "lines": lines}, group=group
        )
        result["nodes"] = nodes
        result["clocks"] = clocks(group, nodes)
    finally:
        dist.destroy_process_group()
    path = Path(f"{out}{result['rank']}")
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").replace(path)


def collectives(where: torch.device) -> dict[str, dict[str, Any]]:
    """Run each collective once for its result and once for its time; `right` says whether the result is."""
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(ELEMENTS // world * world, dtype=torch.float32, device=where) % 64
    total = world * (world - 1) / 2  # sum of the ranks
    part = numbers.numel() // world

    def all_reduce() -> bool:
        data = numbers + rank
        dist.all_reduce(data)
        return torch.equal(data, numbers * world + total)

    def all_gather() -> bool:
        gathered = torch.empty(numbers.numel() * world, device=where)
        compat.all_gather_rows(gathered, numbers + rank, group=None)
        return all(torch.equal(gathered[r * numbers.numel() : (r + 1) * numbers.numel()], numbers + r) for r in range(world))

    def reduce_scatter() -> bool:
        mine = torch.empty(part, device=where)
        compat.reduce_scatter_rows(mine, numbers + rank, group=None)
        return torch.equal(mine, numbers[rank * part : (rank + 1) * part] * world + total)

    def all_to_all() -> bool:
        received = torch.empty_like(numbers)
        dist.all_to_all_single(received, torch.full_like(numbers, rank))
        return torch.equal(received, torch.arange(world, device=where, dtype=torch.float32).repeat_interleave(part))

    def send_recv() -> bool:
        received = torch.empty_like(numbers)
        ops = [
            dist.P2POp(dist.isend, numbers + rank, (rank + 1) % world),
            dist.P2POp(dist.irecv, received, (rank - 1) % world),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return torch.equal(received, numbers + (rank - 1) % world)

    tests = {"all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter, "all_to_all": all_to_all}
    if world > 1:
        tests["send_recv"] = send_recv
    return {name: _run(test, where) for name, test in tests.items()}


def _run(test: Any, where: torch.device) -> dict[str, Any]:
    right = bool(test())
    dist.barrier()
    start = time.perf_counter()
    right = bool(test()) and right  # the comparison at its end waits for the device
    return {"right": right, "seconds": time.perf_counter() - start}


def clocks(group: Any, nodes: list[dict]) -> dict[str, list[float]]:
    """Host -> (seconds ahead of rank 0's clock, precision), by the quickest of some exchanges, as NTP does it."""
    rank, offsets = dist.get_rank(), {}
    first = {node["host"]: index for index, node in reversed(list(enumerate(nodes)))}
    for host, other in first.items():
        if other == 0:
            continue
        tries = []
        for _ in range(ROUNDS):
            if rank == 0:
                sent = time.time()
                dist.send(torch.zeros(1, dtype=torch.float64), other, group=group)
                theirs = torch.zeros(1, dtype=torch.float64)
                dist.recv(theirs, other, group=group)
                back = time.time()
                tries.append((back - sent, float(theirs) - (sent + back) / 2))
            elif rank == other:
                dist.recv(torch.zeros(1, dtype=torch.float64), 0, group=group)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=group)
        if rank == 0:
            took, ahead = min(tries)
            offsets[host] = [ahead, took / 2]
    return offsets


if __name__ == "__main__":
    main()
