"""megatron-core without an accelerator: what it asks of CUDA, answered by the CPU. For processes of its own: torch is changed in them.

megatron-core calls `torch.cuda` by name (devices, streams, random state), makes tensors with `device="cuda"`, looks for the name of CUDA's
tensor types, and hands the sizes of an all-to-all over as tensors. Import this module, then megatron.
"""

import contextlib
import functools
import os
from collections import defaultdict

import torch
import torch.distributed as dist

from llmtrain.engine.support import SUPPORT, Cell

SUPPORT["megatron"]["cpu"] = Cell("in this process")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its `jit_fuser` is torch.compile, several seconds of import
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
CPU = torch.device("cpu")
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "eye", "linspace", "as_tensor")
FACTORIES += ("empty_like", "zeros_like", "ones_like")


class Idle:
    """A stream or an event: everything has happened already."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        return False

    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return event or Idle()

    def __getattr__(self, name: str):
        return lambda *args, **options: None


def is_cuda(device) -> bool:
    return device is not None and str(getattr(device, "type", device)).startswith("cuda")


def on_cpu(make):
    """A factory of tensors that makes on the CPU what is wanted on CUDA."""

    @functools.wraps(make)
    def made(*args, **options):
        if is_cuda(options.get("device")):
            options["device"] = CPU
        options.pop("pin_memory", None)
        return make(*args, **options)

    return made


def answer(value):
    """A function of its own that gives `value`, whatever it is asked: torch's compiler wants each name to have another one."""
    return lambda *args, **options: value


def install() -> None:
    """Change torch in this process."""
    cuda, tensor = torch.cuda, torch.Tensor
    cuda.current_device = answer(CPU)  # which megatron-core passes on as `device=`
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args: Idle())
    cuda.Stream, cuda.Event = type("Stream", (Idle,), {}), type("Event", (Idle,), {})
    for name in ("stream", "device"):
        setattr(cuda, name, lambda *args: contextlib.nullcontext())
    for name in ("synchronize", "set_device", "empty_cache", "set_stream"):
        setattr(cuda, name, answer(None))
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda seed: torch.default_generator.manual_seed(seed))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = defaultdict(lambda: torch.default_generator)
    cuda.is_current_stream_capturing, cuda.get_device_capability = answer(False), answer((0, 0))
    cuda.nvtx.range_push, cuda.nvtx.range_pop, tensor.record_stream = answer(None), answer(None), answer(None)
    for owner in (tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **options: self
    tensor.pin_memory = lambda self, *args: self
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor.to, tensor.type = _to(tensor.to), _type(tensor.type)
    dist.all_to_all_single = _all_to_all(dist.all_to_all_single)


def _to(plain):
    def to(self, *args, **options):
        args = tuple(CPU if is_cuda(argument) and not isinstance(argument, torch.Tensor | torch.dtype) else argument for argument in args)
        if is_cuda(options.get("device")):
            options["device"] = CPU
        return plain(self, *args, **options)

    return to


def _type(plain):
    """Its optimizer insists on `torch.cuda.FloatTensor`."""

    def type_(self, *args, **options):
        found = plain(self, *args, **options)
        return found if args or options else found.replace("torch.", "torch.cuda.", 1)

    return type_


def _all_to_all(plain):
    """It makes numbers of sizes that lie on CUDA alone."""

    def all_to_all_single(output, given, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        sizes = (None if s is None else [int(size) for size in s] for s in (output_split_sizes, input_split_sizes))
        return plain(output, given.contiguous(), *sizes, group=group, async_op=async_op)

    return all_to_all_single


install()
