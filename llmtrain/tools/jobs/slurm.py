"""A batch script for Slurm: `srun` starts one task per rank, and each task reads its place from Slurm (`llmtrain.tools.slurm`)."""

from dataclasses import dataclass

from llmtrain.tools.jobs import script
from llmtrain.tools.jobs.job import Job


@dataclass(frozen=True)
class SlurmOptions:
    """What Slurm is asked for beside nodes and tasks. gres: `gpu:8`; the site's own name where that differs."""

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    gres: str | None = None
    requeue: bool = False


GRES = {"cuda": "gpu", "npu": "npu"}
"""Names of generic resources. `gpu` is Slurm's own; what a site calls its NPUs is its own choice."""


def render(job: Job, options: SlurmOptions) -> str:
    """The text of the batch script."""
    lines = ["#!/usr/bin/env bash", *script.header(job, how="Hand it in: sbatch FILE.")]
    lines += [*_directives(job, options), "set -euo pipefail", ""]
    lines += [*script.go_to_workdir(job), "", *script.environment_lines(job), "", *_run(job), "", *_end(options)]
    return "\n".join(lines) + "\n"


def _directives(job: Job, options: SlurmOptions) -> list[str]:
    gres = options.gres or (f"{GRES[job.device]}:{job.per_node}" if job.device in GRES else None)
    wanted = [
        (f"--job-name={job.name}", ""),
        (f"--nodes={job.nodes}", ""),
        (f"--ntasks-per-node={job.per_node}", "one task per rank; its number on the node picks the device"),
        (f"--gres={gres}" if gres else "", "devices of a node; all its tasks see all of them"),
        ("--exclusive", "all cores of the nodes, which llmtrain shares out itself"),
        ("--mem=0", "all memory of the nodes"),
        (f"--time={options.time}", "the run saves and stops before this ends (guards.deadline slurm)"),
        ("--output=%x-%j.out", "rank 0 writes here; the run folder has the other ranks' logs"),
        ("--open-mode=append" if options.requeue else "", "a requeued job goes on in the same file"),
        ("--requeue" if options.requeue else "", "so that the script may hand itself in again"),
        (f"--partition={options.partition}" if options.partition else "", ""),
        (f"--account={options.account}" if options.account else "", ""),
    ]
    return [f"#SBATCH {word:34s}{f'# {why}' if why else ''}".rstrip() for word, why in wanted if word]


def _run(job: Job) -> list[str]:
    options = f"srun --nodes={job.nodes} --ntasks-per-node={job.per_node} --kill-on-bad-exit=0 --wait=60 --cpu-bind=none"
    return [
        "# --cpu-bind=none: Slurm would give each task one core; llmtrain binds ranks to cores near their devices.",
        "# --wait=60: when one rank has ended, the others get a minute to save before they are ended too.",
        "code=0",
        f'{options} "${{PYTHON:-python}}" \\',
        f"  -m {job.command} || code=$?",
    ]


def _end(options: SlurmOptions) -> list[str]:
    """What follows from the exit code: 2 is a run that stopped after saving."""
    if options.requeue:
        again = ['  scontrol requeue "$SLURM_JOB_ID"  # goes on from the checkpoint']
    else:
        again = ['  echo "stopped after saving; sbatch this file again and the run goes on from there"']
    return ['if [ "$code" -eq 2 ]; then', *again, "fi", 'exit "$code"']
