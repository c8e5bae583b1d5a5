"""A script to start on every node by hand, by ssh or by a scheduler that is not known here."""

from collections.abc import Sequence

from llmtrain.tools.jobs import script
from llmtrain.tools.jobs.job import Job


def render(job: Job, *, hosts: Sequence[str] = (), master: str | None = None) -> str:
    """The script. hosts: names of the nodes in order, by which a node finds its number; without them it is the script's argument."""
    if job.nodes == 1:
        how = "Start it: bash FILE."
    elif hosts:
        how = "Start it on every node: bash FILE. A node finds its number in the list of hosts."
    else:
        how = f"Start it on every node: bash FILE NUMBER, with NUMBER 0 to {job.nodes - 1}; node 0 is where the ranks meet."
    lines = ["#!/usr/bin/env bash", *script.header(job, how=how), "set -euo pipefail", ""]
    lines += [*_place(job, hosts, master), "", *script.go_to_workdir(job), "", *script.environment_lines(job), ""]
    address = "127.0.0.1" if job.nodes == 1 else '"$master"'
    lines += _command(job, address)
    return "\n".join(lines) + "\n"


def _command(job: Job, address: str) -> list[str]:
    return script.torchrun(job, node_rank="0" if job.nodes == 1 else '"$node"', master=address)


def _place(job: Job, hosts: Sequence[str], master: str | None) -> list[str]:
    """Lines that find the node's number and the meeting place."""
    if job.nodes == 1:
        return ["# One node: its ranks meet on the machine itself."]
    first = master or (hosts[0] if hosts else None)
    meeting = f"master={first}" if first else 'master="${MASTER_ADDR:?set MASTER_ADDR to the name of node 0}"'
    if not hosts:
        usage = f"give the number of this node, 0 to {job.nodes - 1}"
        return [meeting, f'node="${{1:?{usage}}}"']
    return [
        meeting,
        f"hosts=({' '.join(hosts)})",
        'node="${1:-}"',
        'for number in "${!hosts[@]}"; do',
        '  case "${hosts[$number]}" in "$(hostname)" | "$(hostname -s)" | "$(hostname -f)") node="${node:-$number}" ;; esac',
        "done",
        ': "${node:?this machine, $(hostname), is not among the hosts of this script; give its number as the first argument}"',
    ]
