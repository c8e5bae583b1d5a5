"""aten's NPU kernels carried out by the CPU's, on the same bytes: a stand-in's device memory is host memory.

Only ops for which torch_npu itself has a kernel are replaced; the rest goes where it goes on hardware, by way of the CPU.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEEP = {
    "set_",
    "resize_",
    "resize_as_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "pin_memory",
    "_has_compatible_shallow_copy_type",
    "item",
}
"""torch_npu's own kernels that only handle memory: they work as they are. So do `empty*` and views."""
CPU = torch.device("cpu")


def on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same bytes as an NPU tensor, which must outlive it."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    bytes_ = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype).set_(bytes_, tensor.storage_offset(), tensor.shape, tensor.stride())
    alias = alias.conj() if tensor.is_conj() else alias
    return alias._neg_view() if tensor.is_neg() else alias


def on_npu(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the NPU."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_cpu(copy).copy_(tensor)
    return copy


class Bridge:
    """Arguments of one call on their way to the CPU, and results on their way back."""

    def __init__(self):
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        """id of the CPU tensor -> (CPU tensor, NPU tensor); holding both keeps the ids their own."""
        self.device: torch.device | None = None
        self.stays = False
        """The call asks for its result on the CPU."""

    def there(self, value: Any) -> Any:
        """`value` with CPU tensors (over the same bytes) for NPU tensors, and the CPU for an NPU."""
        if isinstance(value, Tensor):
            if value.device.type != "npu":
                return value
            self.device = self.device or value.device
            alias = on_cpu(value)
            self.tensors[id(alias)] = (alias, value)
            return alias
        if isinstance(value, (list, tuple)):
            return type(value)([self.there(item) for item in value])
        if isinstance(value, torch.device) and value.type == "cpu":
            self.stays = True
        if isinstance(value, torch.device) and value.type == "npu":
            self.device = torch.device("npu", torch.npu.current_device() if value.index is None else value.index)
            return CPU
        return value

    def back(self, value: Any) -> Any:
        """`value` with NPU tensors: those that came in, and copies of new ones."""
        if isinstance(value, Tensor):
            if id(value) in self.tensors:
                return self.tensors[id(value)][1]
            return value.clone() if self.stays else on_npu(value, self.device or current())
        if isinstance(value, (list, tuple)):
            return type(value)([self.back(item) for item in value])
        return value

    def keep_resized(self) -> None:
        """Bring results home that a kernel wrote into a tensor which it had to make larger first."""
        for alias, tensor in self.tensors.values():
            if alias.shape != tensor.shape:
                tensor.resize_(alias.shape)
                on_cpu(tensor).copy_(alias)


def current() -> torch.device:
    """The current NPU."""
    return torch.device("npu", torch.npu.current_device())


def carried_out(function: Callable, *, generator: int | None = None) -> Callable:
    """`function` of CPU tensors as a kernel for NPU tensors. generator: place of the argument of that name."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        bridge = Bridge()
        args = [bridge.there(value) for value in args]
        kwargs = {name: bridge.there(value) for name, value in kwargs.items()}
        if generator is not None and len(args) <= generator:
            kwargs["generator"] = _generator(kwargs.get("generator"), bridge.device or current())
        result = function(*args, **kwargs)
        bridge.keep_resized()
        return bridge.back(result)

    return kernel


_streams: dict[int, torch.Generator] = {}


def _generator(given: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A CPU generator that follows an NPU generator: equal seed and offset give equal numbers.

    Every call moves the NPU generator on by 4, as its own kernels do, and is drawn from (seed, offset) alone: a restored state draws again.
    """
    if given is not None and given.device.type == "cpu":
        return given
    given = given or torch.npu.default_generators[device.index or 0]
    offset = given.get_offset()
    given.set_offset(offset + 4)
    stream = _streams.setdefault(device.index or 0, torch.Generator())
    return stream.manual_seed((given.initial_seed() * 1_000_003 + offset) % 2**63)


def _matmul_backward(grad: Tensor, a: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    if a.dim() == 1 or b.dim() == 1:
        raise NotImplementedError("matmul_backward of a vector is not in the stand-in: tests/npu/support/npu_kernels.py")
    return (
        (grad @ b.transpose(-1, -2)).sum_to_size(a.shape) if wanted[0] else None,
        (a.transpose(-1, -2) @ grad).sum_to_size(b.shape) if wanted[1] else None,
    )


def _linear_backward(x: Tensor, grad: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ weight if wanted[0] else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _tensors(function: Callable) -> Callable:
    """`function` with empty tensors for gradients that nobody wants, as op schemas that promise tensors need."""
    return lambda *args: tuple(torch.empty(0) if out is None else out.contiguous() for out in function(*args))


MISSING = {"matmul_backward": _tensors(_matmul_backward), "linear_backward": _tensors(_linear_backward)}
"""Ops that torch has for accelerators alone."""


def _repeat_interleave_backward(grad: Tensor, x: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    if dim is None:
        return grad.view(-1, repeats).sum(-1).view(x.shape)
    return grad.unflatten(dim, (x.shape[dim], repeats)).sum(dim % x.dim() + 1)


def _repeat_interleave_backward_tensor(grad: Tensor, x: Tensor, repeats: Tensor, dim: int | None = None) -> Tensor:
    whole = x.flatten() if dim is None else x
    rows = torch.arange(whole.shape[dim or 0]).repeat_interleave(repeats)
    return torch.zeros_like(whole).index_add_(dim or 0, rows, grad).view(x.shape)


def _gather_backward(grad: Tensor, size: list[int], dim: int, index: Tensor, sparse: bool) -> Tensor:
    return grad.new_zeros(size).scatter_add_(dim, index, grad)


BEHIND_ATEN = {
    "repeat_interleave_backward_int": _repeat_interleave_backward,
    "repeat_interleave_backward_tensor": _repeat_interleave_backward_tensor,
    "npu_gather_backward": _gather_backward,
    "_npu_dtype_cast": lambda x, dtype: x.to(dtype),
    "_npu_dtype_cast_backward": lambda grad, dtype: grad.to(dtype),
}
"""`npu::` ops that torch_npu puts behind plain aten ops."""


def _attention(q, k, v, mask=None, dropout=0.0, causal=False, *, scale=None, enable_gqa=False):
    """Formula of scaled_dot_product_attention in differentiable ops: torch_npu's own goes to a fused kernel below autograd."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.nn.functional.dropout(torch.softmax(scores, -1), dropout), v)


def _one_hot(ids: Tensor, classes: int = -1) -> Tensor:
    """torch_npu's goes to its kernel without a dispatch that could be replaced."""
    classes = int(ids.max()) + 1 if classes < 0 else classes
    return (ids[..., None] == torch.arange(classes, device=ids.device)).long()


_library: list[torch.library.Library] = []


COUNTED = ("aten::_fused_adamw_",)
"""Ops that a run has to call to be called fused, though they are aten's."""


def install(calls: Counter[str]) -> int:
    """Replace aten's NPU kernels in this process; returns how many. Calls of COUNTED are counted in `calls`."""
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every one says that it replaces a kernel
        for schema in torch._C._jit_get_all_schemas():
            if _replaced(schema):
                kernel = _counted(schema.name, _kernel(schema), calls) if schema.name in COUNTED else _kernel(schema)
                library.impl(full_name(schema).removeprefix("aten::"), kernel, "PrivateUse1", allow_override=True)
                count += 1
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            library.impl("scaled_dot_product_attention", _attention, key, allow_override=True)
            library.impl("one_hot", _one_hot, key, allow_override=True)
    return count


def _counted(name: str, kernel: Callable, calls: Counter[str]) -> Callable:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return kernel(*args, **kwargs)

    return counted


def _replaced(schema: Any) -> bool:
    base = schema.name.removeprefix("aten::")
    view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    if not schema.name.startswith("aten::") or view or base in KEEP or base.startswith(("empty", "new_empty", "_npu", "npu_")):
        return False
    return has_npu_kernel(full_name(schema))


def has_npu_kernel(name: str) -> bool:
    """Whether `aten::name.overload` has a kernel of its own for NPUs, by the dispatcher of this process."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")
    except RuntimeError:  # a schema of TorchScript's interpreter, which the dispatcher does not know
        return False


def full_name(schema: Any) -> str:
    """`namespace::name.overload`, as the dispatcher wants it."""
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def _kernel(schema: Any) -> Callable:
    base = schema.name.removeprefix("aten::")
    if base in MISSING:
        return carried_out(MISSING[base])
    names = [argument.name for argument in schema.arguments]
    op = getattr(getattr(torch.ops.aten, base), schema.overload_name or "default")
    return carried_out(op, generator=names.index("generator") if "generator" in names else None)
