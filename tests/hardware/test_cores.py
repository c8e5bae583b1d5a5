"""Cores and threads of ranks: arithmetic on machines written as Linux shows them, and real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.hardware import cores
from llmtrain.hardware.cores import Core

ROOT = Path(__file__).parents[2]


def machine(root: Path, *, nodes: int, cores_per_node: int, threads: int) -> Path:
    """A machine whose hyperthreads are numbered as Linux does: all first threads, then all second ones."""
    total = nodes * cores_per_node
    for core in range(total):
        siblings = [core + thread * total for thread in range(threads)]
        for cpu in siblings:
            folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")
    for node in range(nodes):
        mine = range(node * cores_per_node, (node + 1) * cores_per_node)
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(str(c + t * total) for t in range(threads) for c in mine))
    return root


def dealt(ranks: int, found: list[Core], **options) -> list[tuple[set[int], int]]:
    places = [cores.place(ranks, rank, cores=found, **options) for rank in range(ranks)]
    return [(set(p.cpus), p.threads) for p in places]


def test_hyperthreads_stay_together_and_ranks_spread_over_nodes(tmp_path):
    root = machine(tmp_path, nodes=2, cores_per_node=4, threads=2)
    found = cores.read_cores(frozenset(range(16)), root)
    assert len(found) == 8 and found[0] == Core((0, 8), 0) and found[-1] == Core((7, 15), 1)
    assert dealt(1, found) == [(set(range(16)), 8)]
    assert dealt(2, found) == [({0, 1, 2, 3, 8, 9, 10, 11}, 4), ({4, 5, 6, 7, 12, 13, 14, 15}, 4)]
    assert dealt(8, found)[5] == ({5, 13}, 1)


def test_uneven_ranks_get_disjoint_cores_that_cover_the_machine():
    found = [Core((i,)) for i in range(8)]
    parts = dealt(3, found)
    assert sorted(cpu for cpus, _ in parts for cpu in cpus) == list(range(8))
    assert sorted(threads for _, threads in parts) == [2, 3, 3]


def pci(root: Path, address: str, *, vendor: str, kind: str, node: int) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, value in {"vendor": vendor, "class": kind, "numa_node": str(node)}.items():
        (folder / name).write_text(value + "\n")


def test_the_node_of_a_kind_of_device_is_known_when_all_hang_on_it(tmp_path):
    assert cores.only_node("0x19e5", "0x1200", tmp_path) is None
    pci(tmp_path, "0000:81:00.0", vendor="0x19e5", kind="0x120000", node=2)
    pci(tmp_path, "0000:82:00.0", vendor="0x19e5", kind="0x120000", node=2)
    pci(tmp_path, "0000:83:00.0", vendor="0x19e5", kind="0x020000", node=0)  # a network card
    pci(tmp_path, "0000:84:00.0", vendor="0x10de", kind="0x030200", node=1)
    assert cores.only_node("0x19e5", "0x1200", tmp_path) == 2
    pci(tmp_path, "0000:c1:00.0", vendor="0x19e5", kind="0x120000", node=3)
    assert cores.only_node("0x19e5", "0x1200", tmp_path) is None


def test_a_cpuset_leaves_single_hyperthreads(tmp_path):
    root = machine(tmp_path, nodes=1, cores_per_node=4, threads=2)
    found = cores.read_cores(frozenset({1, 2, 5, 7}), root)
    assert [core.cpus for core in found] == [(1, 5), (2,), (7,)]


def test_ranks_go_to_the_node_of_their_accelerator():
    found = [Core((i,), node=i // 4) for i in range(8)]
    assert dealt(4, found, nodes=[1, 1, 0, 0]) == [({4, 5}, 2), ({6, 7}, 2), ({0, 1}, 2), ({2, 3}, 2)]
    assert dealt(2, found, nodes=[1, None])[0] == ({0, 1, 2, 3}, 4)  # not known of every device: the machine is shared out
    assert dealt(2, found, nodes=[1, 7])[0] == ({0, 1, 2, 3}, 4)  # a node without allowed cores


def test_more_ranks_than_cores_share_them_evenly():
    found = [Core((0,)), Core((1,))]
    assert [cpus for cpus, _ in dealt(4, found)] == [{0}, {0}, {1}, {1}]
    assert "4 ranks share 2 cores" in cores.place(4, 0, cores=found).note


@pytest.mark.parametrize(("quota", "ranks", "threads"), [(2.0, 1, 2), (2.0, 2, 1), (1.5, 1, 1), (0.5, 2, 1), (100.0, 2, 4)])
def test_threads_keep_to_the_quota(quota, ranks, threads):
    assert dealt(ranks, [Core((i,)) for i in range(8)], quota=quota)[0][1] == threads


def test_quota_of_both_versions_of_control_groups(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    proc = tmp_path / "proc/self/cgroup"
    group = tmp_path / "sys/fs/cgroup/jobs/one"
    group.mkdir(parents=True)
    proc.write_text("0::/jobs/one\n")
    assert cores.cpu_quota(tmp_path) is None
    (group / "cpu.max").write_text("max 100000\n")
    assert cores.cpu_quota(tmp_path) is None
    (group.parent / "cpu.max").write_text("250000 100000\n")  # the limit of a group around it counts
    assert cores.cpu_quota(tmp_path) == 2.5
    old = tmp_path / "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    old.mkdir(parents=True)
    proc.write_text("4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n")
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.cpu_quota(tmp_path) is None
    (old / "cpu.cfs_quota_us").write_text("150000\n")
    assert cores.cpu_quota(tmp_path) == 1.5


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "2", cores.OURS: "2"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 1),
    ],
)
def test_whose_thread_count(env, threads):
    assert cores.wanted_threads(env) == threads


def test_lists():
    assert cores.parse_list("0-2,8\n") == [0, 1, 2, 8] and cores.parse_list("") == []
    assert cores.format_list([8, 0, 1, 2]) == "0-2,8"


def test_pci_node(tmp_path):
    folder = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    assert cores.pci_node("0000:1b:00.0", tmp_path) == 1
    (folder / "numa_node").write_text("-1\n")
    assert cores.pci_node("0000:1b:00.0", tmp_path) is None


# --- real processes -------------------------------------------------------------------------------------------------------------------

PROBE = """
import json, os, sys, threading, torch
from llmtrain.config.train import ParallelConfig
from llmtrain.device import select
from llmtrain.parallel import mesh as world
from llmtrain.parallel.cores import settled


def main(held):
    threading.Thread(target=held.wait, daemon=True).start()  # a thread that was there before
    cfg = ParallelConfig.model_validate(json.loads(sys.argv[2]))
    mesh = world.start(cfg, device=select("cpu"))
    with settled(cfg, mesh=mesh) as words:
        tasks = sorted({tuple(sorted(os.sched_getaffinity(int(t)))) for t in os.listdir("/proc/self/task")})
        found = {"words": words, "tasks": tasks, "threads": torch.get_num_threads()}
    found["after"] = sorted(os.sched_getaffinity(0))
    json.dump(found, open(f"{sys.argv[1]}/rank-{mesh.rank}.json", "w"))
    mesh.meet()
    world.stop(mesh)

held = threading.Event()
main(held)
held.set()
"""
pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind processes")
MANY = pytest.mark.skipif(len(cores.read_cores(cores.allowed_cpus())) < 2, reason="needs two cores")


def ranks_of(folder: Path, launcher: list[str], ranks: int, env: dict | None = None, **options) -> list[dict]:
    script = folder / "probe.py"
    script.write_text(PROBE)
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", cores.OURS)}
    command = [*launcher, str(script), str(folder), json.dumps({"dp_shard": ranks, **options})]
    done = subprocess.run(command, env=clean | {"PYTHONPATH": str(ROOT)} | (env or {}), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]


def ours(ranks: int) -> list[str]:
    code = "import sys; from llmtrain.tools.launch import run_local; "
    return [sys.executable, "-c", code + f"sys.exit(run_local(sys.argv[1:], {ranks}, command=[sys.executable]))"]


@MANY
@pytest.mark.parametrize("launcher", [torchrun, ours])
def test_two_ranks_share_the_cores_out(tmp_path, launcher):
    one, two = ranks_of(tmp_path, launcher(2), 2)
    all_cores = cores.read_cores(cores.allowed_cpus())
    assert len(one["tasks"]) == len(two["tasks"]) == 1, "a thread that runs elsewhere"
    assert not set(one["tasks"][0]) & set(two["tasks"][0])
    assert set(one["tasks"][0]) | set(two["tasks"][0]) == cores.allowed_cpus()
    quota = cores.cpu_quota() or len(all_cores)
    assert one["threads"] + two["threads"] == min(len(all_cores), max(2, int(quota)))
    assert one["words"] == two["words"] and " | " in one["words"]
    assert one["after"] == sorted(cores.allowed_cpus())


def test_one_process_has_all_cores(tmp_path):
    [one] = ranks_of(tmp_path, [sys.executable], 1)
    assert one["tasks"] == [sorted(cores.allowed_cpus())]
    assert one["threads"] == cores.place(1, 0, cores=cores.read_cores(cores.allowed_cpus()), quota=cores.cpu_quota()).threads


@MANY
def test_switched_off_or_set_by_hand(tmp_path):
    for rank in ranks_of(tmp_path, torchrun(2), 2, affinity="off"):
        assert rank["tasks"] == [sorted(cores.allowed_cpus())] and "all ranks on" in rank["words"]
    for rank in ranks_of(tmp_path, torchrun(2), 2, threads=3):
        assert rank["threads"] == 3 and "parallel.threads" in rank["words"]
    [one] = ranks_of(tmp_path, [sys.executable], 1, {"OMP_NUM_THREADS": "5"})
    assert one["threads"] == 5 and "OMP_NUM_THREADS" in one["words"]


@MANY
def test_ranks_that_a_launcher_has_bound_stay_there(tmp_path):
    first = min(cores.allowed_cpus())
    bound = f"import os, runpy, sys; os.environ['RANK'] == '0' and os.sched_setaffinity(0, {{{first}}}); sys.argv = sys.argv[1:]; "
    wrapper = tmp_path / "bound.py"
    wrapper.write_text(bound + "runpy.run_path(sys.argv[0], run_name='__main__')")
    one, two = ranks_of(tmp_path, [*torchrun(2), str(wrapper)], 2)
    assert one["tasks"] == [[first]] and two["tasks"] == [sorted(cores.allowed_cpus())]
    assert one["threads"] == 1 and "bound by the launcher" in one["words"]
