"""Op name -> implementations; which one serves a call, and why the others do not."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from llmtrain.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EVERYWHERE = ("cpu", "cuda", "npu")


class KernelUnavailable(UserError, ValueError):
    """No implementation of an op, or not the named one, can serve the call; the message names the option `kernels.OP`."""


@dataclass(frozen=True)
class Call:
    """What an implementation is asked to serve. Facts that an op does not care about keep their defaults.

    `dtype` is the compute dtype, `parameter_dtype` the dtype in which the optimizer updates (`dtype` if None).
    `extra` holds facts of ops that plugins bring.
    """

    device: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    backward: bool = True
    deterministic: bool = False
    parameter_dtype: torch.dtype | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    causal: bool = True
    documents: bool = False
    window: int | None = None
    offsets: bool = False
    return_lse: bool = False
    expert_widths: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op; see `register`."""

    op: str
    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    speed: float
    probe: Callable[[], str | None]
    supports: Callable[[Call], str | None]
    backward: bool
    deterministic: bool
    parts: tuple[str, ...] = ()

    def refusal(self, call: Call) -> str | None:
        """Why this implementation cannot serve `call`, or None if it can."""
        if call.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {call.device}"
        dtype = (call.parameter_dtype or call.dtype) if self.op in PARAMETER_OPS else call.dtype
        if dtype not in self.dtypes:
            return f"serves {', '.join(map(_plain, self.dtypes))}, not {_plain(dtype)}"
        if call.backward and not self.backward:
            return "has no backward"
        if call.deterministic and not self.deterministic:
            return "is not deterministic"
        return self.probe() or self.supports(call)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one op. `reason` says why; `rejected` maps the faster ones, or all others tried, to their reasons."""

    op: str
    name: str
    function: Callable[..., Any]
    reason: str
    rejected: Mapping[str, str]
    parts: tuple[str, ...] = ()


class Ops:
    """Every op, chosen once: `ops.attention(...)`; `ops.choices` maps op -> Choice."""

    def __init__(self, choices: Mapping[str, Choice]):
        self.choices = dict(choices)
        for op, choice in self.choices.items():
            parts = [self.choices[part].function for part in choice.parts]
            setattr(self, op, partial(choice.function, *parts) if parts else choice.function)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        raise AttributeError(f"no op {op!r}; there are {', '.join(self.__dict__.get('choices', ()))}")


PARAMETER_OPS = {"adamw"}
SEPARATE = "separate"
"""An implementation of two ops in one that calls the two, as they were chosen."""

JOINED = {"add_rms_norm": "rms_norm"}
"""Ops that are two in one. Unless named, they take the implementation of the op that they contain, or `separate`: a model has one norm."""

_REGISTRY: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    name: str,
    *,
    devices: Iterable[str] = EVERYWHERE,
    dtypes: Iterable[torch.dtype] = FLOATS,
    speed: float,
    probe: Callable[[], str | None] | None = None,
    supports: Callable[[Call], str | None] | None = None,
    backward: bool = True,
    deterministic: bool = True,
    parts: Iterable[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function as implementation `name` of `op`.

    `speed` orders implementations of one op (the reference has 0, those below it are only taken when named); `auto` takes the highest that
    serves. `probe()` says why it cannot be used on this machine at all (asked once), `supports(call)` why it cannot serve a call; both
    return None when it can. The functions chosen for the ops `parts` are passed to it before its arguments. Raises ValueError when the
    pair is already registered.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        entries = _REGISTRY.setdefault(op, {})
        if name in entries:
            raise ValueError(f"kernels.{op}={name} is registered already, by {entries[name].function.__module__}")
        checks = {"probe": cache(probe or _nothing), "supports": supports or _nothing}
        entries[name] = Implementation(
            op,
            name,
            function,
            tuple(devices),
            tuple(dtypes),
            speed,
            backward=backward,
            deterministic=deterministic,
            parts=tuple(parts),
            **checks,
        )
        return function

    return add


def unregister(op: str, name: str) -> None:
    """Remove an implementation, and the op with its last one."""
    del _REGISTRY[op][name]
    if not _REGISTRY[op]:
        del _REGISTRY[op]


def implementations(op: str) -> list[Implementation]:
    """Those of `op`, fastest first. Raises KernelUnavailable for an unknown op."""
    if op not in _REGISTRY:
        raise KernelUnavailable(f"kernels.{op}: no such op{_did_you_mean(op, _REGISTRY)}; ops are {', '.join(_REGISTRY)}")
    return sorted(_REGISTRY[op].values(), key=lambda entry: -entry.speed)


def op_names() -> list[str]:
    """Every registered op."""
    return list(_REGISTRY)


def choose(op: str, call: Call, choice: str = "auto") -> Choice:
    """The implementation of `op` for `call`. Raises KernelUnavailable when `choice` is unknown or cannot serve, or nothing can."""
    entries = implementations(op)
    return _fastest(op, call, entries) if choice == "auto" else _named(op, call, entries, choice)


def resolve(kernels: Mapping[str, str], call: Call) -> Ops:
    """Choose every op once: by name where `kernels` (the configuration section) names one, else the fastest."""
    for op in kernels:
        implementations(op)
    choices = {op: choose(op, call, kernels.get(op, "auto")) for op in _REGISTRY}
    for op, inner in JOINED.items():
        if kernels.get(op, "auto") == "auto":
            choices[op] = _like(choices[inner], op, call)
    return Ops(choices)


def _like(inner: Choice, op: str, call: Call) -> Choice:
    """The implementation of `op` that belongs to the choice for the op that it contains."""
    entries = {entry.name: entry for entry in implementations(op)}
    refusal = entries[inner.name].refusal(call) if inner.name in entries else "has no such implementation"
    entry = entries[SEPARATE if refusal else inner.name]
    return Choice(
        op, entry.name, entry.function, f"kernels.{inner.op} is {inner.name}", {inner.name: refusal} if refusal else {}, entry.parts
    )


def _fastest(op: str, call: Call, entries: list[Implementation]) -> Choice:
    rejected: dict[str, str] = {}
    for entry in entries:
        reason = entry.refusal(call)
        if reason is None:
            why = "the fastest that serves" if len(entries) > 1 else "the only one"
            return Choice(op, entry.name, entry.function, why, rejected, entry.parts)
        rejected[entry.name] = reason
    listed = "; ".join(f"{name} {reason}" for name, reason in rejected.items())
    raise KernelUnavailable(f"kernels.{op}=auto: nothing serves {_plain(call.dtype)} on {call.device}: {listed}")


def _named(op: str, call: Call, entries: list[Implementation], name: str) -> Choice:
    by_name = {entry.name: entry for entry in entries}
    if name not in by_name:
        allowed = ", ".join(["auto", *by_name])
        raise KernelUnavailable(f"kernels.{op}={name}: no such implementation{_did_you_mean(name, by_name)}; allowed: {allowed}")
    reason = by_name[name].refusal(call)
    if reason is not None:
        serving = [entry.name for entry in entries if entry.refusal(call) is None]
        raise KernelUnavailable(f"kernels.{op}={name}: {name} {reason}; serving this call: {', '.join(['auto', *serving])}")
    return Choice(op, name, by_name[name].function, "named in the configuration", {}, by_name[name].parts)


def _nothing(*_: Any) -> None:
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
