"""The part that all job files share: a shell script that sets the environment line by line."""

import shlex
import textwrap

from llmtrain.tools.jobs.environment import Variable
from llmtrain.tools.jobs.job import Job

WIDTH = 110
GRACE = 240
"""Seconds a run may take to save once it is asked to stop."""
SET_ENV = ("/usr/local/Ascend/ascend-toolkit/set_env.sh", "/usr/local/Ascend/cann/set_env.sh")
"""Where CANN's packages put the script that makes it known: up to 8.3, and later."""


def header(job: Job, *, how: str) -> list[str]:
    """Comment lines: what the file is for, and how it is used."""
    lines = [f"{job.headline()}.", *textwrap.wrap(f"{how} Written by `llmtrain launch`; write it anew rather than edit the mesh.", WIDTH)]
    return [f"# {line}" for line in lines]


def environment_lines(job: Job) -> list[str]:
    """`# why` and `export NAME=value` for each variable, with CANN's own script first where it is needed."""
    lines = _cann() if job.device == "npu" else []
    for variable in job.environment():
        lines += _lines(variable)
    return lines


def _lines(variable: Variable) -> list[str]:
    why = [f"# {line}" for line in textwrap.wrap(variable.why, WIDTH)]
    return [*why, f"# {variable.value}" if variable.name is None else f"export {variable.name}={variable.value}"]


def _cann() -> list[str]:
    """CANN's set_env.sh, which reads variables that may be unset."""
    return [
        "# CANN's libraries and tools: without this script torch_npu does not load.",
        f"for cann in {' '.join(SET_ENV)}; do",
        '  if [ -n "${ASCEND_HOME_PATH:-}" ] || [ ! -f "$cann" ]; then continue; fi',
        "  set +u",
        "  # shellcheck disable=SC1090",
        '  source "$cann"',
        "  set -u",
        "done",
        ': "${ASCEND_HOME_PATH:?CANN is not installed where this script looks: source its set_env.sh before}"',
    ]


def go_to_workdir(job: Job) -> list[str]:
    """The folder that relative paths of the configuration start from."""
    return ["# Relative paths of the configuration start here; all nodes must see this folder.", f"cd {shlex.quote(str(job.workdir))}"]


def torchrun(job: Job, *, node_rank: str, master: str) -> list[str]:
    """The command of one node: torchrun starts its ranks. `node_rank` and `master` are shell words."""
    grace = [
        "# seconds that torchrun gives the ranks to save after SIGTERM, 30 by default; it ends all of them when one fails",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={GRACE}",
    ]
    options = [f"--nnodes {job.nodes}", f"--node-rank {node_rank}", f"--nproc-per-node {job.per_node}"]
    options += [f"--master-addr {master}", f"--master-port {job.port}"]
    return [*grace, f'exec "${{PYTHON:-python}}" -m torch.distributed.run {" ".join(options)} \\', f"  -m {job.command}"]
