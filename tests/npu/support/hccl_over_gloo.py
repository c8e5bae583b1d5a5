"""`hccl` groups carried by gloo, for NPU tensors whose bytes are host memory. As with HCCL, a group takes NPU tensors alone."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from npu_kernels import Bridge
from torch._C._distributed_c10d import ProcessGroupGloo

OPS = (
    "allreduce_",
    "allreduce_coalesced_",
    "allgather_",
    "_allgather_base_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "broadcast_",
    "reduce_",
    "gather_",
    "scatter_",
    "alltoall_",
    "alltoall_base_",
    "send",
    "recv_",
    "recv_any_source_",
    "barrier",
)
GROUPS: dict[str, "HcclOverGloo"] = {}
"""Groups by the name that `get_hccl_comm_name` gives, which fused matmul + collective ops are called with."""
_numbers = itertools.count()
_libraries: list[torch.library.Library] = []


class HcclOverGloo(ProcessGroupGloo):
    """A group that torch takes for HCCL's, with the methods of ProcessGroupHCCL that are called from Python."""

    def __init__(self, options: Any, hccl_options: Any):
        super().__init__(options.store, options.group_rank, options.group_size, options.timeout)
        self.hccl_options = hccl_options
        """What init_process_group or new_group was given: torch_npu's own object."""
        self.comm_name = f"stand-in-{next(_numbers)}"
        self.twin = dist.ProcessGroup(options.store, options.group_rank, options.group_size)
        """The same group as torch knows groups for CPU tensors."""
        self.twin._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self)
        GROUPS[self.comm_name] = self

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """Name of the communicator for fused ops; `rank` is this process's own."""
        if rank != dist.get_rank():
            raise ValueError(f"get_hccl_comm_name wants the global rank of this process, {dist.get_rank()}, got {rank}")
        return self.comm_name

    def batch_isend_irecv(self, kinds: list[str], tensors: list[torch.Tensor], peers: list[int]) -> "Works":
        """Point-to-point transfers that start together; `peers` are ranks of this group."""
        bridge = Bridge()
        start = {"isend": self.send, "irecv": self.recv}
        return Works([start[kind]([bridge.there(tensor)], peer, 0) for kind, tensor, peer in zip(kinds, tensors, peers)], bridge)

    def allgather(self, outputs: list, inputs: list, *options: Any) -> Any:
        """torch_npu's `gather` asks for it directly."""
        bridge = Bridge()
        return Works([super().allgather(bridge.there(outputs), bridge.there(inputs), *options)], bridge)


class Works:
    """Several transfers waited for as one."""

    def __init__(self, works: list, bridge: Bridge):
        self.works = works
        self.bridge = bridge  # holds the tensors until the transfers are done

    def wait(self, *timeout: Any) -> bool:
        """Wait for all of them."""
        return all(work.wait(*timeout) for work in self.works)

    def is_completed(self) -> bool:
        """Whether all have ended."""
        return all(work.is_completed() for work in self.works)


def install() -> None:
    """Make `hccl` a back end over gloo in this process."""
    library = torch.library.Library("c10d", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every one says that it replaces a kernel
        for name in OPS:
            library.impl(name, _redirected(getattr(torch.ops.c10d, name).default), "PrivateUse1", allow_override=True)
    dist.Backend.backend_list = [name for name in dist.Backend.backend_list if name != "hccl"]
    dist.Backend._plugins.pop("HCCL")
    dist.Backend.register_backend("hccl", HcclOverGloo, extended_api=True, devices=["npu"])


def _redirected(op: Callable) -> Callable:
    """The kernel for NPU tensors of a c10d op: its CPU kernel, on the group's twin."""

    def kernel(*args: Any) -> Any:
        bridge = Bridge()
        return bridge.back(op(*[_twin(value) if isinstance(value, torch.ScriptObject) else bridge.there(value) for value in args]))

    return kernel


def _twin(boxed: torch.ScriptObject) -> torch.ScriptObject:
    if "ProcessGroup" not in str(boxed._type()):
        return boxed
    return dist.ProcessGroup.unbox(boxed)._get_backend(torch.device("npu")).twin.boxed()
