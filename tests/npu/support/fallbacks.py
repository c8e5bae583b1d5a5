"""Which aten ops of a piece of work torch_npu has no kernel for: on hardware they run on the CPU, with a copy there and back."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from npu_kernels import full_name
from torch import Tensor
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch.utils._python_dispatch import TorchDispatchMode

MADE_OF_OTHERS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class Fallbacks(TorchDispatchMode):
    """Counts calls of ops on NPU tensors (`seen`), and of those among them that fall back (`found`), by name.

    The stand-in replaces only kernels that torch_npu has, so what it lacks is missing here too.
    """

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = full_name(func._schema), kwargs or {}
        if name.startswith("aten::") and any(_on_npu(value) for value in (*args, *kwargs.values())):
            self.seen[name] += 1
            if not has_kernel(name, "PrivateUse1") and not any(has_kernel(name, key) for key in MADE_OF_OTHERS):
                self.found[name] += 1
        return func(*args, **kwargs)


def _on_npu(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_on_npu(item) for item in value)
    return value.device.type == "npu" if isinstance(value, Tensor) else getattr(value, "type", "") == "npu"
