"""The environment of a rank on a cluster, variable by variable, each with what it does and why it is there.

Only variables that change something for the better are set. Those that torch, NCCL, HCCL or llmtrain choose well by themselves are left
alone: OMP_NUM_THREADS (llmtrain shares out the cores once the ranks have met), TORCH_NCCL_ASYNC_ERROR_HANDLING, the flight recorder's
TORCH_FR_BUFFER_SIZE (on by default), HCCL_WHITELIST_DISABLE (torch_npu sets it), CPU_AFFINITY_CONF (`parallel.affinity` binds).
"""

from dataclasses import dataclass
from math import ceil

from llmtrain.config.parameters import BYTES
from llmtrain.config.run import RunConfig
from llmtrain.layout.mesh import AXES, EXPERT_AXES, FLAT, MeshShape
from llmtrain.layout.steps import StepPlan

HCCL_BUFFER, HCCL_EXEC, HCCL_CONNECT = 200, 1836, 600
"""MB and seconds: HCCL's defaults, and a time to connect that outlives a slow node's imports (HCCL's own is 120, the range 120 to 7200)."""
MARGIN = 120
"""Seconds that a library's time-out stays behind `parallel.timeout`, so that llmtrain's report of a hang comes first."""


@dataclass(frozen=True)
class Variable:
    """A variable, its value as the shell reads it, and why it is set. A name of None is a line to uncomment: `value` says which."""

    name: str | None
    value: str
    why: str


def environment(cfg: RunConfig, *, device: str, shape: MeshShape, interface: str | None, logs: str) -> list[Variable]:
    """The variables for `device` (cpu, cuda, npu). `interface` of the network between the nodes; `logs`: folder of libraries' logs."""
    kinds = {"cpu": _cpu, "cuda": _cuda, "npu": _npu}
    common = [Variable("PYTHONUNBUFFERED", "1", "lines of the log appear when they are written, not when a buffer is full")]
    return common + kinds[device](cfg, shape, interface, logs)


def _cpu(cfg: RunConfig, shape: MeshShape, interface: str | None, logs: str) -> list[Variable]:
    return [_gloo(interface)]


def _cuda(cfg: RunConfig, shape: MeshShape, interface: str | None, logs: str) -> list[Variable]:
    """Sources: NCCL user guide, Environment Variables; torch notes, CUDA semantics (Optimizing memory usage)."""
    return [
        Variable(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            "segments of device memory grow instead of being abandoned, so sequences of changing length fragment it less",
        ),
        Variable("NCCL_DEBUG", "WARN", "NCCL says in words why it fails; INFO also shows the rings and links it chose"),
        _interface("NCCL_SOCKET_IFNAME", interface, "the interface NCCL meets over (and sends over where there is no InfiniBand)"),
        _gloo(interface),
    ]


def _npu(cfg: RunConfig, shape: MeshShape, interface: str | None, logs: str) -> list[Variable]:
    """Sources: hiascend.com, CANN 8.5 environment variable reference (HCCL_*, ASCEND_*), Ascend Extension for PyTorch reference."""
    buffer, groups = hccl_buffer(cfg), communicators(shape)
    return [
        Variable(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "as PYTORCH_ALLOC_CONF of CUDA: less fragmentation (wants driver package Ascend HDK 23.0.0 or newer)",
        ),
        Variable(
            "HCCL_CONNECT_TIMEOUT",
            str(HCCL_CONNECT),
            "seconds that ranks wait for each other's first connection; 120 by default, which a node that reads Python from a busy disk "
            "exceeds (error EI0006)",
        ),
        Variable(
            "HCCL_EXEC_TIMEOUT",
            str(max(HCCL_EXEC, ceil(cfg.parallel.timeout) + MARGIN)),
            f"seconds a collective may wait on the device; later than parallel.timeout ({cfg.parallel.timeout:g}), so that llmtrain's "
            "report of who waits for whom comes before HCCL's error EI0002",
        ),
        Variable(
            "HCCL_BUFFSIZE",
            str(buffer),
            f"MB: parallel.hccl_buffer_mb, or micro-batch x sequence x width and at least HCCL's default of 200. Each communicator takes "
            f"twice that, with this mesh up to {groups} of them a rank: {2 * buffer * groups / 1024:.1f} GB of device memory",
        ),
        Variable("ASCEND_PROCESS_LOG_PATH", f'"{logs}/ascend"', "where CANN writes its logs (plog), which its error codes refer to"),
        _interface("HCCL_SOCKET_IFNAME", interface, "the host interface HCCL meets over; HCCL_IF_IP=ADDRESS is the other way to name it"),
        Variable(
            None,
            "sysctl -w net.ipv4.ip_local_reserved_ports=60000-60015",
            "on each node, once, as root: HCCL listens on these ports, and the kernel may give them to others",
        ),
        Variable(None, "export ASCEND_LAUNCH_BLOCKING=1", "slow, but an error then names the line of Python that caused it"),
        _gloo(interface),
    ]


def hccl_buffer(cfg: RunConfig) -> int:
    """HCCL_BUFFSIZE in MB: `parallel.hccl_buffer_mb`, which a run sets over any other value, or what its reference recommends.

    For language models that is micro-batch x sequence x width x bytes, and at least the default.
    """
    if cfg.parallel.hccl_buffer_mb is not None:
        return cfg.parallel.hccl_buffer_mb
    largest = max(phase.micro_batch * phase.seq_len for phase in StepPlan.from_config(cfg).phases)
    return max(HCCL_BUFFER, ceil(largest * cfg.model.hidden * BYTES[cfg.precision.compute] / 2**20))


def communicators(shape: MeshShape) -> int:
    """Groups of more than one rank that a rank can be in, and the world."""
    axes = [*AXES, *FLAT, *(a for a in EXPERT_AXES if a not in AXES and (shape.ep > 1 or shape.etp > 1))]
    return 1 + sum(len(shape.group(axis, 0).ranks) > 1 for axis in axes)


def _gloo(interface: str | None) -> Variable:
    return _interface("GLOO_SOCKET_IFNAME", interface, "the interface gloo meets over, and sends over where the CPU computes")


def _interface(name: str, interface: str | None, why: str) -> Variable:
    if interface is not None:
        return Variable(name, interface, why)
    return Variable(None, f"export {name}=eth0", f"{why}; to be named where a node has several and the wrong one is taken")
