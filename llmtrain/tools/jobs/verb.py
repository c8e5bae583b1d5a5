"""`llmtrain launch`: writes the file that starts a run on a cluster, after checking that the run fits it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.arguments import parse_run_arguments
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.tools.jobs import kubernetes, slurm, torchrun
from llmtrain.tools.jobs.job import DEVICES, Job, check

SUFFIX = {"torchrun": "sh", "slurm": "sbatch", "kubernetes": "yaml"}


def main(argv: Sequence[str]) -> int:
    """Write the job file that the words ask for and say what to do with it. Returns 0; raises UserError for a run that does not fit."""
    options, overrides = parser().parse_known_args(argv)
    if options.device is not None:
        overrides.append(f"--device={options.device}")
    cfg = parse_run_arguments(["-c", options.config, *overrides], verb=options.verb)[0].run
    job = _job(options, _with_length(cfg, options.verb), overrides)
    check(job)
    out = Path(options.out or f"{job.name}.{SUFFIX[options.kind]}")
    if out.exists() and not options.force:
        raise UserError(f"{out} exists; --force writes over it, --out names another file")
    out.write_text(_render(job, options))
    if options.kind != "kubernetes":
        out.chmod(0o755)
    _report(job, out, options)
    return 0


def _job(options: argparse.Namespace, cfg: RunConfig, overrides: list[str]) -> Job:
    words = ["-c", options.config, *overrides]
    if options.kind == "slurm" and cfg.guards.deadline is None:
        words.append("--guards.deadline=slurm")
    return Job(
        cfg=cfg,
        name=options.job_name or cfg.name.replace("_", "-").lower(),
        device=_device(cfg),
        nodes=options.nodes,
        per_node=options.per_node or (1 if cfg.device == "cpu" else 8),
        verb=options.verb,
        words=tuple(words),
        workdir=Path(options.workdir).absolute(),
        interface=options.interface,
        port=options.port,
    )


def _with_length(cfg: RunConfig, verb: str) -> RunConfig:
    """`cfg` with some length where only the run can know it, from its data: nothing in a job file depends on it."""
    train = cfg.train
    if train.epochs is None and (verb != "sft" or train.steps or train.tokens or train.phases):
        return cfg
    return cfg.model_copy(update={"train": train.model_copy(update={"epochs": None, "steps": 1})})


def _device(cfg: RunConfig) -> str:
    if cfg.device not in DEVICES:
        raise UserError(f"device {cfg.device}: the job's nodes are not this machine, so name what they have: --device {'|'.join(DEVICES)}")
    return cfg.device


def _render(job: Job, options: argparse.Namespace) -> str:
    if options.kind == "torchrun":
        hosts = options.hosts.split(",") if options.hosts else []
        if hosts and len(hosts) != job.nodes:
            raise UserError(f"--hosts names {len(hosts)} machines, --nodes is {job.nodes}")
        return torchrun.render(job, hosts=hosts, master=options.master)
    if options.kind == "slurm":
        wanted = slurm.SlurmOptions(options.time, options.partition, options.account, options.gres, options.requeue)
        return slurm.render(job, wanted)
    image = options.image or f"llmtrain:{job.device}"
    return kubernetes.render(
        job, kubernetes.KubernetesOptions(image, options.claim, options.namespace, options.resource, options.shm, options.retries)
    )


def _report(job: Job, out: Path, options: argparse.Namespace) -> None:
    print(f"{out}: {job.headline()}")
    for note in job.notes:
        print(f"note: {note}")
    number = " NUMBER" if job.nodes > 1 and not options.hosts else ""
    following = {"torchrun": f"bash {out}{number}", "slurm": f"sbatch {out}", "kubernetes": f"kubectl apply -f {out}"}
    where = " (on every node)" if options.kind == "torchrun" and job.nodes > 1 else ""
    print(f"next: {following[options.kind]}{where}")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain launch`; options of the run follow as overrides."""
    top = argparse.ArgumentParser(
        prog="llmtrain launch",
        description="Write the file that starts a run on a cluster. Options of the run may follow: --parallel.tp 8",
        allow_abbrev=False,
    )
    kinds = top.add_subparsers(dest="kind", required=True, metavar="torchrun|slurm|kubernetes")
    for name, add in (("torchrun", _torchrun), ("slurm", _slurm), ("kubernetes", _kubernetes)):
        one = kinds.add_parser(name, help=add.__doc__, description=add.__doc__, allow_abbrev=False)
        _common(one)
        add(one)
    return top


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("-c", "--config", required=True, help="the run's YAML file, by the path it has on the nodes")
    p.add_argument("--device", choices=DEVICES, help="what the nodes have; needed unless the file names a device")
    p.add_argument("--nodes", type=int, default=1, help="machines (1)")
    p.add_argument("--per-node", type=int, help="ranks of a machine, a device each (8; cpu: 1)")
    p.add_argument("--verb", default="train", help="what is run: train or another stage (train)")
    p.add_argument("--job-name", help="name of the job (the run's)")
    p.add_argument("--workdir", default=".", help="folder on the nodes that relative paths start from (this one)")
    p.add_argument("--interface", help="network interface between the nodes, eth0 or the like")
    p.add_argument("--port", type=int, default=29500, help="port of node 0 where ranks meet, but under Slurm (29500)")
    p.add_argument("--out", help="file to write (NAME.sh, NAME.sbatch or NAME.yaml)")
    p.add_argument("--force", action="store_true", help="write over an existing file")
    p.set_defaults(hosts=None)


def _torchrun(p: argparse.ArgumentParser) -> None:
    """A script to start on every node."""
    p.add_argument("--hosts", help="names of the nodes, by which they find their numbers: a,b,c")
    p.add_argument("--master", help="address of node 0 (the first host, or MASTER_ADDR)")


def _slurm(p: argparse.ArgumentParser) -> None:
    """A batch script for sbatch."""
    p.add_argument("--time", default="24:00:00", help="time limit of the job (24:00:00)")
    p.add_argument("--partition", help="partition of the cluster")
    p.add_argument("--account", help="account that is charged")
    p.add_argument("--gres", help="devices of a node by the site's name (gpu:8, npu:8)")
    p.add_argument("--requeue", action="store_true", help="hand the job in again when the run stopped after saving")


def _kubernetes(p: argparse.ArgumentParser) -> None:
    """An Indexed Job and its Service."""
    p.add_argument("--image", help="container image with llmtrain in it (llmtrain:DEVICE, see docker/)")
    p.add_argument("--claim", help="PersistentVolumeClaim mounted at --workdir")
    p.add_argument("--namespace", help="namespace (that of kubectl)")
    p.add_argument("--resource", help="resource name of the devices (nvidia.com/gpu, huawei.com/Ascend910)")
    p.add_argument("--shm", default="16Gi", help="size of /dev/shm (16Gi)")
    p.add_argument("--retries", type=int, default=3, help="restarts of all pods (3)")
