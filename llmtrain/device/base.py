"""What a device offers, one method per need; nothing above this floor asks torch for a device by name."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

import torch

from llmtrain.device.host_copies import HostCopies, StreamCopies
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware, match


class DeviceUnavailable(UserError, RuntimeError):
    """The named device cannot be used; the message says why and what to install or change."""


class Memory(NamedTuple):
    """Bytes in use by this process now, at most since `reset_peak_memory`, and on the device in total."""

    allocated: int
    peak: int
    total: int


class Device(ABC):
    """One device of this process. Subclasses hold what differs; accelerators share `Accelerator`."""

    kind: ClassVar[str]
    collective_backend: ClassVar[str]
    fix: ClassVar[str] = ""
    """What a user does about an unavailable device of this kind."""

    def __init__(self, index: int = 0):
        self.index = index
        self.torch_device = torch.device(self.kind, index)

    @classmethod
    @abstractmethod
    def unavailable(cls) -> str | None:
        """Why no device of this kind can be used here, or None."""

    @classmethod
    def expected(cls) -> bool:
        """Whether this machine is set up for such devices, so that having to do without one is worth a warning."""
        return False

    @abstractmethod
    def count(self) -> int:
        """Devices of this kind on this machine."""

    @abstractmethod
    def set_current(self) -> None:
        """Make this the process's default device of its kind."""

    @abstractmethod
    def name(self) -> str:
        """The product's name."""

    def hardware(self) -> Hardware | None:
        """The entry of `llmtrain/hardware/` for this product, or None."""
        return match(self.name())

    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability, or None elsewhere."""
        return None

    @abstractmethod
    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        """Why `dtype` cannot be computed in here, with what to use instead, or None."""

    def autocast_dtype(self) -> torch.dtype:
        """The 16-bit dtype to compute in: bfloat16 where the device has it."""
        return torch.float16 if self.unsupported_dtype(torch.bfloat16) else torch.bfloat16

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work queued on this device."""

    @abstractmethod
    def stream(self) -> AbstractContextManager[Any] | None:
        """A new stream to enter with `with`, or None on a device without streams."""

    @abstractmethod
    def event(self) -> Any | None:
        """A new timing event, or None on a device without streams."""

    def host_copies(self) -> HostCopies:
        """What copies tensors to the host's memory and back, beside what this device computes."""
        return HostCopies()

    @abstractmethod
    def memory(self) -> Memory:
        """Memory of this process on this device."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new peak."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give cached memory back to the device."""

    @abstractmethod
    def seed(self, n: int) -> None:
        """Seed the generators of this device and of the CPU."""

    @abstractmethod
    def rng_state(self) -> dict[str, torch.Tensor]:
        """The generators' states, CPU included, as uint8 CPU tensors."""

    @abstractmethod
    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `rng_state` returned."""

    def deterministic(self, on: bool) -> None:
        """Make every op deterministic, or raise when one is not."""
        torch.use_deterministic_algorithms(on)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Peak FLOP/s of dense matrix products in `dtype`, or None where nobody published it."""
        hardware = self.hardware()
        return None if hardware is None else hardware.peak_flops(str(dtype).removeprefix("torch."))

    def process_group_options(self, timeout: timedelta, *, buffer_mb: int | None = None) -> dict[str, Any]:
        """Keyword arguments for torch.distributed.init_process_group beyond back end and timeout. buffer_mb: parallel.hccl_buffer_mb."""
        return {}

    def group_options(self, timeout: timedelta, *, buffer_mb: int | None = None) -> Any | None:
        """Options of one further process group, as torch's back end takes them, made anew for each; None where the world's serve."""
        return None

    def numa_node(self) -> int | None:
        """The NUMA node that this device hangs on, or None where that is not known."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """One line for a human."""


class Accelerator(Device):
    """A device that has a torch.<kind> module with the common functions: CUDA and NPU."""

    @property
    def module(self) -> Any:
        """torch.cuda or torch.npu."""
        return torch.get_device_module(self.kind)

    def count(self) -> int:
        return self.module.device_count()

    def set_current(self) -> None:
        self.module.set_device(self.index)

    def name(self) -> str:
        return self.module.get_device_name(self.index)

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        return None

    def synchronize(self) -> None:
        self.module.synchronize(self.index)

    def stream(self) -> AbstractContextManager[Any]:
        return self.module.stream(self.module.Stream(self.index))

    def event(self) -> Any:
        return self.module.Event(enable_timing=True)

    def host_copies(self) -> HostCopies:
        return StreamCopies(self.module, self.kind, self.index)

    def memory(self) -> Memory:
        total = self.module.get_device_properties(self.index).total_memory
        return Memory(self.module.memory_allocated(self.index), self.module.max_memory_allocated(self.index), total)

    def reset_peak_memory(self) -> None:
        self.module.reset_peak_memory_stats(self.index)

    def empty_cache(self) -> None:
        self.module.empty_cache()

    def seed(self, n: int) -> None:
        torch.manual_seed(n)
        self.module.manual_seed(n)

    def rng_state(self) -> dict[str, torch.Tensor]:
        return {"cpu": torch.get_rng_state(), self.kind: self.module.get_rng_state(self.index)}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.kind in state:
            self.module.set_rng_state(state[self.kind], self.index)

    def describe(self) -> str:
        total = self.memory().total / 2**30
        return f"{self.kind}:{self.index} {self.name()}, {total:.0f} GiB, {self.count()} on this machine"
