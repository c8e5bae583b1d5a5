"""An Indexed Job for Kubernetes with a headless Service: nothing beyond Kubernetes itself and the vendor's device plugin is needed.

Every pod is a node: its number is the Job's completion index, and pod 0 is found by the name that the Service gives it.
Sources: kubernetes.io, Job with Pod-to-Pod Communication; NVIDIA and Ascend device plugins for the names of resources; hiascend.com,
MindCluster, Preparation of Job YAML Files, for the driver's folders.
"""

import re
import textwrap
from dataclasses import dataclass

from llmtrain.errors import UserError
from llmtrain.tools.jobs import script
from llmtrain.tools.jobs.job import Job

RESOURCES = {"cuda": "nvidia.com/gpu", "npu": "huawei.com/Ascend910"}
DRIVER = {
    "driver": ("/usr/local/Ascend/driver", "Directory"),
    "dcmi": ("/usr/local/dcmi", "Directory"),
    "npu-smi": ("/usr/local/bin/npu-smi", "File"),
    "install-info": ("/etc/ascend_install.info", "File"),
    "hccn": ("/etc/hccn.conf", "File"),
}
"""What the Ascend device plugin does not bring into a pod where Ascend Docker Runtime is not installed."""


@dataclass(frozen=True)
class KubernetesOptions:
    """image: with llmtrain in it (docker/). claim: PersistentVolumeClaim mounted at the working directory. retries: pods that may fail."""

    image: str
    claim: str | None = None
    namespace: str | None = None
    resource: str | None = None
    shm: str = "16Gi"
    retries: int = 3


def render(job: Job, options: KubernetesOptions) -> str:
    """Service and Job as one YAML file. Raises UserError for a name that Kubernetes refuses."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", job.name):
        raise UserError(
            f"--job-name {job.name!r}: Kubernetes wants up to 52 lower-case letters, digits and dashes, a letter first; give --job-name"
        )
    head = script.header(job, how="Hand it in: kubectl apply -f FILE.")
    return "\n".join([*head, *_service(job, options), "---", *_job(job, options)]) + "\n"


def _metadata(job: Job, options: KubernetesOptions) -> list[str]:
    return ["metadata:", f"  name: {job.name}", *([f"  namespace: {options.namespace}"] if options.namespace else [])]


def _service(job: Job, options: KubernetesOptions) -> list[str]:
    return [
        "# Gives every pod a name that the others find: NAME-0.NAME is where the ranks meet.",
        "apiVersion: v1",
        "kind: Service",
        *_metadata(job, options),
        "spec:",
        "  clusterIP: None",
        "  publishNotReadyAddresses: true  # pods look for each other before they are ready",
        "  selector: {job-name: " + job.name + "}",
    ]


def _job(job: Job, options: KubernetesOptions) -> list[str]:
    return [
        "apiVersion: batch/v1",
        "kind: Job",
        *_metadata(job, options),
        "spec:",
        "  completionMode: Indexed  # each pod knows its number: JOB_COMPLETION_INDEX",
        f"  completions: {job.nodes}",
        f"  parallelism: {job.nodes}  # all at once: a run waits for all of its ranks",
        f"  backoffLimit: {options.retries * job.nodes}  # {options.retries} restarts of all pods; each goes on from the newest checkpoint",
        "  template:",
        "    spec:",
        f"      subdomain: {job.name}",
        "      restartPolicy: Never",
        f"      terminationGracePeriodSeconds: {script.GRACE + 60}  # SIGTERM makes a run save; this is how long it may take",
        "      securityContext: {runAsNonRoot: true, runAsUser: 1000, fsGroup: 1000}  # the user of the images in docker/",
        *_spread(job),
        "      containers:",
        "        - name: llmtrain",
        f"          image: {options.image}",
        *_resources(job, options),
        *_mounts(job, options),
        '          command: ["bash", "-c"]',
        "          args:",
        "            - |",
        *textwrap.indent("\n".join(_script(job)), " " * 14).splitlines(),
        *_volumes(job, options),
    ]


def _spread(job: Job) -> list[str]:
    """A pod to a node, where a pod does not already take all devices of one."""
    if job.nodes == 1:
        return []
    return [
        "      affinity:  # one pod to a node",
        "        podAntiAffinity:",
        "          requiredDuringSchedulingIgnoredDuringExecution:",
        f"            - {{topologyKey: kubernetes.io/hostname, labelSelector: {{matchLabels: {{job-name: {job.name}}}}}}}",
    ]


def _resources(job: Job, options: KubernetesOptions) -> list[str]:
    name = options.resource or RESOURCES.get(job.device)
    if name is None:
        return ["          resources: {requests: {cpu: " + str(job.per_node) + "}}  # a core a rank at least"]
    return [f"          resources: {{limits: {{{name}: {job.per_node}}}}}  # given out by the vendor's device plugin"]


def _mounts(job: Job, options: KubernetesOptions) -> list[str]:
    mounts = ["          volumeMounts:", "            - {name: shm, mountPath: /dev/shm}  # NCCL and data workers; Docker gives 64 MiB"]
    if options.claim:
        mounts.append(f"            - {{name: work, mountPath: {job.workdir}}}  # configuration, data, checkpoints")
    if job.device == "npu":
        mounts += [f"            - {{name: {name}, mountPath: {path}, readOnly: true}}" for name, (path, _) in DRIVER.items()]
    return mounts


def _volumes(job: Job, options: KubernetesOptions) -> list[str]:
    volumes = ["      volumes:", f"        - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: {options.shm}}}}}"]
    if options.claim:
        volumes.append(f"        - {{name: work, persistentVolumeClaim: {{claimName: {options.claim}}}}}")
    if job.device == "npu":
        volumes.append("        # The host's driver; leave these out where Ascend Docker Runtime brings it.")
        volumes += [f"        - {{name: {name}, hostPath: {{path: {path}, type: {kind}}}}}" for name, (path, kind) in DRIVER.items()]
    return volumes


def _script(job: Job) -> list[str]:
    start = script.torchrun(job, node_rank='"$JOB_COMPLETION_INDEX"', master=f"{job.name}-0.{job.name}")
    return ["set -euo pipefail", *script.go_to_workdir(job), *script.environment_lines(job), *start]
