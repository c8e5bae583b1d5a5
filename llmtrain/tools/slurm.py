"""What Slurm tells a task about its place, in the variables that torch.distributed reads."""

import re
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 20_000, 20_000


def adopt_rank(env: MutableMapping[str, str]) -> bool:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from `srun`'s variables; False if not under `srun`.

    Only a step of several tasks counts: a batch script, or a shell that `srun` opened, is no rank. Values already set are kept.
    Variables: Slurm's srun(1), OUTPUT ENVIRONMENT VARIABLES.
    """
    tasks = env.get("SLURM_STEP_NUM_TASKS") or (env.get("SLURM_NTASKS") if "SLURM_STEP_ID" in env else None)
    if tasks is None or int(tasks) < 2 or "SLURM_PROCID" not in env:
        return False
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or tasks
    port = FIRST_PORT + (int(env.get("SLURM_JOB_ID", 0)) * 7 + int(env.get("SLURM_STEP_ID", 0))) % PORTS
    places = {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": str(expand_counts(per_node)[int(env.get("SLURM_NODEID", 0))]),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(port),
    }
    for name, value in places.items():
        env.setdefault(name, value)
    return True


def first_host(nodelist: str) -> str:
    """The first host of a Slurm host list: `gpu[03-07,11],login1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST {nodelist!r} is no host list; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def expand_counts(counts: str) -> list[int]:
    """Slurm's tasks per node, written out: `4(x2),3` -> [4, 4, 3]."""
    result = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {counts!r} is no list of counts; set LOCAL_WORLD_SIZE")
        result += [int(match[1])] * int(match[2] or 1)
    return result
