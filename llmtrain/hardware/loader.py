"""Reads `llmtrain/hardware/*.yaml` into typed, checked objects; no torch."""

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from llmtrain.errors import UserError

FOLDER = Path(__file__).parent


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Quantity(_Frozen):
    """A number and where it comes from."""

    value: PositiveFloat
    source: str


class Link(Quantity):
    """A connection of one device: `value` in bytes/s in one direction, all lanes of the device together."""

    name: str
    mesh: bool = False
    """Whether each pair of devices has lanes of its own, so that a group of few uses few of them; else a switch joins all."""


class Collective(Quantity):
    """One kind of collective as measured over so many ranks: `value` in bytes/s of what a rank sends (`layout.traffic.sent`)."""

    kind: str
    ranks: PositiveInt
    latency: PositiveFloat
    """Seconds beside what the bytes take."""


class Rates(_Frozen):
    """How near to its figures the machine comes; what is not given is taken from the table of `llmtrain/simulate/fitted.yaml`."""

    matrix: dict[str, Quantity] = {}
    """Share of the peak that large matrix products reach, by torch dtype name."""
    clock: Quantity | None = None
    """Clock under load over that of the product whose `matrix` shares these are, where power is limited more."""
    attention: Quantity | None = None
    """Share of the peak in the forward pass of attention."""
    attention_backward: Quantity | None = None
    """Rate of its backward pass over that of the forward pass."""
    context: Quantity | None = None
    """As `attention`, under context parallelism, where another kernel serves it."""
    context_backward: Quantity | None = None
    memory: Quantity | None = None
    """Share of the memory bandwidth that element-wise operations reach."""
    grouped: Quantity | None = None
    """Rate of the products of experts over that of other products."""
    collectives: list[Collective] = []
    """Each kind of collective by itself; where there are any, `links` and `latency` are not asked."""
    process: Quantity | None = None
    """Bytes of a process that trains, beside its tensors, where devices are ranks on a processor."""
    retained: dict[str, Quantity] = {}
    """Bytes that its allocator keeps for each byte of tensors (`all`), and besides, in runs with these axes, for each byte of gathered
    parameters (`fsdp`) and of activations (`tp`, `cp`, `pp`)."""
    launch: Quantity | None = None
    """Seconds of the host's time for an operation."""
    latency: Quantity | None = None
    """Seconds that a collective takes whatever its size, per step of its ring."""


class Hardware(_Frozen):
    """One accelerator as torch counts devices (one die of a 910C). Peaks are of dense matrix products, without sparsity."""

    key: str
    vendor: str
    names: list[str]
    """Regular expressions found in the name that the driver reports."""
    peak: dict[str, Quantity]
    """FLOP/s by torch dtype name."""
    memory: Quantity
    """Bytes."""
    memory_bandwidth: Quantity | None = None
    """Bytes/s."""
    links: dict[str, Link] = {}
    """`node`: to the other devices of the node; `network`: out of it."""
    devices_per_node: PositiveInt = 8
    """Devices that the link `node` joins."""
    cores: PositiveFloat | None = None
    """Processor cores that the ranks of a node share, where the devices are ranks on a processor. Then nothing hides beside computing, for
    collectives are work of the same cores, and a rank that waits leaves its cores to the others."""
    rates: Rates = Rates()
    """Measured shares of the figures above."""
    notes: str = ""

    def peak_flops(self, dtype: str) -> float | None:
        """Peak FLOP/s for a torch dtype name such as `bfloat16`, or None where no source gives one."""
        return self.peak[dtype].value if dtype in self.peak else None


def keys() -> list[str]:
    """Every accelerator known, variants included."""
    return sorted(_all())


def load(key: str) -> Hardware:
    """The accelerator `key`, or the one that the file `key` (`*.yaml`) describes. Raises UserError with the keys there are."""
    if key.endswith((".yaml", ".yml")):
        return _of_file(Path(key))
    if key not in _all():
        close = difflib.get_close_matches(key.lower(), keys(), n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(f"hardware {key!r} is not known{hint}; known: {', '.join(keys())}")
    return _all()[key]


def match(device_name: str) -> Hardware | None:
    """The accelerator whose driver reports `device_name`, or None."""
    found = [hardware for hardware in _all().values() if any(re.search(pattern, device_name) for pattern in hardware.names)]
    return found[0] if len(found) == 1 else None


def _of_file(path: Path) -> Hardware:
    """A description outside the package, as `llmtrain plan calibrate` writes it."""
    if not path.is_file():
        raise UserError(f"hardware {path}: no such file")
    try:
        return Hardware(key=path.stem, **yaml.safe_load(path.read_text()))
    except (ValidationError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"hardware {path}: {error}") from None


@cache
def _all() -> dict[str, Hardware]:
    entries: dict[str, Hardware] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        values: dict[str, Any] = yaml.safe_load(path.read_text())
        variants = values.pop("variants", {})
        entries[path.stem] = Hardware(key=path.stem, **values)
        for name, changes in variants.items():
            entries[name] = Hardware(**_merge(values, {**changes, "key": name}))
    return entries


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: the entries of `peak`, `links` and `rates` one by one, everything else whole."""
    merged = {**base, **changes}
    for part in ("peak", "links", "rates"):
        merged[part] = {**base.get(part, {}), **changes.get(part, {})}
    return merged
