"""Which aten ops of a piece of work torch_npu has no kernel for: on hardware they run on the CPU, with a copy there and back."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from npu_kernels import full_name
from torch import Tensor
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MADE_OF_OTHERS = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class Fallbacks(TorchDispatchMode):
    """Counts calls of ops on NPU tensors by name: all (`seen`) and those that fall back (`found`). `composed`: ops that torch_npu has no
    kernel for, since torch's own makes them of others -> those others, as the profiler saw them in the first call; no dispatch mode does.
    Views, which compute nothing, are left out.

    The stand-in replaces only kernels that torch_npu has, so what it lacks is missing here too.
    """

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.composed: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = full_name(func._schema), kwargs or {}
        if name.startswith("aten::") and any(_on_npu(value) for value in (*args, *kwargs.values())):
            self.seen[name] += 1
            if not has_kernel(name, "PrivateUse1"):
                if func._can_decompose():  # arrives whole in inference mode; its parts are then seen one by one
                    with self:
                        return func.decompose(*args, **kwargs)
                if not made_of_others(name):
                    self.found[name] += 1
                elif not func.is_view and name not in self.composed:
                    return self._look_inside(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _look_inside(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        with_overloads = torch._C._profiler._ExperimentalConfig(capture_overload_names=True)
        with profile(activities=[ProfilerActivity.CPU], experimental_config=with_overloads) as seen:
            result = func(*args, **kwargs)
        (event,) = [event for event in seen.events() if event.cpu_parent is None and _name(event) == name]
        self.composed[name] = set(_parts(event))
        return result


def made_of_others(name: str) -> bool:
    """Whether torch has a kernel for every device that calls other ops."""
    return any(has_kernel(name, key) for key in MADE_OF_OTHERS)


def _name(event: Any) -> str:
    return f"{event.name}.{event.overload_name}" if event.overload_name else event.name


def _parts(event: Any) -> Iterator[str]:
    """Ops that `event` called and that run on the device, or fall back: those that are made of others again are taken apart."""
    for child in event.cpu_children:
        name = _name(child)
        if has_kernel(name, "PrivateUse1") or not (made_of_others(name) or has_kernel(name, "CompositeImplicitAutograd")):
            yield name
        else:
            yield from _parts(child)


def _on_npu(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_on_npu(item) for item in value)
    return value.device.type == "npu" if isinstance(value, Tensor) else getattr(value, "type", "") == "npu"
