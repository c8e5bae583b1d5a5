"""Copies of tensors between a device and the host's memory, made beside what the device computes."""

from typing import Any

import torch
from torch import Tensor


class Copy:
    """A copy that may still be under way; holds on to what is copied until it has been waited for."""

    def __init__(self, tensor: Tensor, source: Tensor, *, event: Any = None, module: Any = None):
        self._tensor, self._source, self._event, self._module = tensor, source, event, module

    def wait(self) -> Tensor:
        """The copy, for what the device does from now on; the host waits for nothing."""
        if self._event is not None and self._source is not None:
            self._module.current_stream().wait_event(self._event)
        self._source = None
        return self._tensor

    def finish(self) -> Tensor:
        """The copy, for what the host does from now on."""
        if self._event is not None:
            self._event.synchronize()
        self._source = None
        return self._tensor


class HostCopies:
    """Of a device that is the host: each copy is other memory, made at once."""

    def host_memory(self, like: Tensor) -> Tensor:
        """Memory of the host for a tensor of this shape and dtype, laid out alike."""
        return torch.empty_like(like)

    def device_memory(self, like: Tensor) -> Tensor:
        """The same of the device."""
        return torch.empty_like(like)

    def to_host(self, tensor: Tensor, *, into: Tensor | None = None) -> Copy:
        """Begin to copy `tensor` to the host, into memory of its shape if given. Write to neither before the copy has been waited for."""
        return self._copy(tensor, self.host_memory(tensor) if into is None else into)

    def to_device(self, tensor: Tensor) -> Copy:
        """Begin to copy `tensor` of the host to the device."""
        return self._copy(tensor, self.device_memory(tensor))

    def _copy(self, tensor: Tensor, into: Tensor) -> Copy:
        return Copy(into.copy_(tensor), tensor)


class StreamCopies(HostCopies):
    """Of an accelerator: on a stream of their own, to and from pinned memory. Not run on hardware.

    A copy begins when the device has done what it was told before. `module` is torch.cuda or torch.npu, `index` the device's.
    """

    def __init__(self, module: Any, kind: str, index: int):
        self._module, self._device = module, torch.device(kind, index)
        self._stream = module.Stream(index)

    def host_memory(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def device_memory(self, like: Tensor) -> Tensor:
        # Of the stream that computes, which will use and free it; if nobody waits for the copy, not before that has been made.
        memory = torch.empty_like(like, device=self._device)
        memory.record_stream(self._stream)
        return memory

    def _copy(self, tensor: Tensor, into: Tensor) -> Copy:
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            into.copy_(tensor, non_blocking=True)
            event = self._module.Event()
            event.record()
        return Copy(into, tensor, event=event, module=self._module)
