"""Kinds of device, and picking one."""

import difflib
import warnings

from llmtrain.device.base import Device, DeviceUnavailable

_KINDS: dict[str, tuple[type[Device], int]] = {}


def register(device: type[Device], *, preference: int) -> type[Device]:
    """Add a kind of device; `auto` takes the usable one of highest preference. Raises ValueError when the kind exists."""
    if device.kind in _KINDS:
        raise ValueError(f"device kind {device.kind!r} is registered already, by {_KINDS[device.kind][0].__module__}")
    _KINDS[device.kind] = (device, preference)
    return device


def unregister(kind: str) -> None:
    """Remove a kind of device."""
    del _KINDS[kind]


def kinds() -> dict[str, type[Device]]:
    """Every registered kind, the preferred first."""
    ordered = sorted(_KINDS.items(), key=lambda item: -item[1][1])
    return {kind: device for kind, (device, _) in ordered}


def select(name: str = "auto", local_rank: int = 0) -> Device:
    """The device of this rank: `auto` takes the preferred usable kind, a named one must be usable.

    Raises DeviceUnavailable with the reason and what to do, also when `local_rank` is beyond the devices of this machine. `auto` warns
    where it passes over a kind that this machine is set up for.
    """
    known = kinds()
    if name == "auto":
        name = _first_usable(known)
    if name not in known:
        close = difflib.get_close_matches(name, ["auto", *known], n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise DeviceUnavailable(f"device: {name!r} is not a device{hint}; allowed: {', '.join(['auto', *known])}")
    reason = known[name].unavailable()
    if reason is not None:
        raise DeviceUnavailable(f"device: {name} cannot be used: {reason}. {known[name].fix}".strip())
    device = known[name](local_rank)
    if name != "cpu" and local_rank >= device.count():
        found = f"local rank {local_rank} has no {name} device, this machine has {device.count()}"
        raise DeviceUnavailable(f"device: {found}; start at most that many ranks per node")
    return device


def _first_usable(known: dict[str, type[Device]]) -> str:
    for kind, device in known.items():
        reason = device.unavailable()
        if reason is None:
            return kind
        if device.expected():
            warnings.warn(f"device: auto passes over {kind}: {reason}. {device.fix}", stacklevel=3)
    return "cpu"
