"""Outputs of vendors' tools and files as plain values. A text that is not understood gives nothing, never a guess."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Npu:
    """One chip of `npu-smi info`; a 910C has two per card. Memory in MB as npu-smi counts it."""

    card: int
    chip: int
    name: str
    health: str
    bus: str
    used: int
    total: int


@dataclass(frozen=True)
class NpuSmi:
    version: str
    npus: list[Npu]


_NPU_TOP = re.compile(r"^\|\s*(\d+)\s+(\S.*?)\s*\|\s*(\S+)\s*\|")
_NPU_BELOW = re.compile(r"^\|\s*(\d+)(?:\s+\d+)?\s*\|\s*((?:[0-9A-Fa-f]{4}:)\S+|NA|x\S*)\s*\|(.*)\|")


def npu_smi(text: str) -> NpuSmi | None:
    """`npu-smi info` of drivers 23.0 to 26.0: two rows per chip, one with the card's name and health, one with bus and memory."""
    version = re.search(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)", text)
    if version is None:
        return None
    npus, top = [], None
    for line in text.splitlines():
        if "Process id" in line:
            break
        below = _NPU_BELOW.match(line)
        if below and top:
            memory = re.findall(r"(\d+)\s*/\s*(\d+)", below[3])
            used, total = memory[-1] if memory else ("0", "0")
            npus.append(Npu(int(top[1]), int(below[1]), top[2], top[3], below[2], int(used), int(total)))
            top = None
        else:
            top = _NPU_TOP.match(line)
    return NpuSmi(version[2], npus)


def fields(text: str) -> dict[str, str]:
    """`name=value` lines: version.info of driver and firmware, ascend_toolkit_install.info. Some releases write `name: value`."""
    pairs = re.findall(r"^\s*([A-Za-z_]+)\s*[=:]\s*(.*?)\s*$", text, re.MULTILINE)
    return dict(pairs)


def version_cfg(text: str) -> str | None:
    """CANN's version in version.cfg: `toolkit_running_version=[7.6.0.1.220:8.0.0]` -> `8.0.0`."""
    found = re.search(r"^(?:toolkit|runtime)_running_version=\[(?:[^:\]]*:)?([^\]]+)\]", text, re.MULTILINE)
    return found[1] if found else None


def firmware_range(text: str) -> tuple[str, str] | None:
    """The firmware a driver works with: `compatible_version_fw=[7.0.0,7.7.99]` -> the two ends."""
    found = re.fullmatch(r"\[([\d.]+),([\d.]+)\]", fields(text).get("compatible_version_fw", ""))
    return (found[1], found[2]) if found else None


@dataclass(frozen=True)
class Gpu:
    """One GPU of `nvidia-smi`. Memory in MiB. `ecc` counts uncorrected errors since the start; None where ECC is off or unknown."""

    index: int
    name: str
    bus: str
    used: int
    total: int
    ecc: int | None


@dataclass(frozen=True)
class NvidiaSmi:
    driver: str
    cuda: str
    gpus: list[Gpu]


def nvidia_smi(text: str) -> NvidiaSmi | None:
    """The table of `nvidia-smi` without options, drivers 450 to 580."""
    head = re.search(r"Driver Version:\s*(\S+)\s+CUDA Version:\s*(\S+)", text)
    if head is None:
        return None
    gpus, top = [], None
    for line in text.splitlines():
        if "Processes:" in line:
            break
        memory = re.search(r"(\d+)MiB\s*/\s*(\d+)MiB", line)
        if memory and top:
            ecc = int(top[4]) if top[4].isdigit() else None
            gpus.append(Gpu(int(top[1]), top[2], top[3], int(memory[1]), int(memory[2]), ecc))
            top = None
        else:
            top = re.match(r"^\|\s*(\d+)\s+(\S.*?)\s+(?:On|Off)\s*\|\s*(\S+)\s+\S+\s*\|\s*(\S+)\s*\|", line) or top
    return NvidiaSmi(head[1], head[2], gpus)


def topology(text: str) -> dict[tuple[str, str], str]:
    """`nvidia-smi topo -m` and `npu-smi info -t topo`: (`GPU0`, `GPU1`) -> `NV12`, `PIX`, `HCCS`, ...; devices alone, each pair once."""
    rows = [line.split() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    header = next((row for row in rows if row and re.fullmatch(r"(?:GPU|NPU)\d+", row[0]) and "X" not in row), [])
    columns = [name for name in header if re.fullmatch(r"(?:GPU|NPU|NIC)\d+|mlx\S+", name)]
    links = {}
    for row in rows:
        if len(row) <= len(columns) or not re.fullmatch(r"(?:GPU|NPU)\d+", row[0]) or "X" not in row:
            continue
        for name, link in zip(columns, row[1:]):
            if name[:3] == row[0][:3] and int(name[3:]) > int(row[0][3:]):
                links[row[0], name] = link
    return links


def hccn_link(text: str) -> str | None:
    """`hccn_tool -i 0 -link -g`: `link status: UP` -> `UP`."""
    found = re.search(r"link status:\s*(\w+)", text)
    return found[1].upper() if found else None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: `25.0.rc1.1` -> (25, 0), `8.2.RC1` -> (8, 2), `2.13.0+cpu` -> (2, 13, 0)."""
    parts = []
    for part in re.split(r"[.\-+]", version):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def series(version: str) -> str:
    """The release a version belongs to: `9.1.0-beta.3` -> `9.1`, `25.0.rc1.1` -> `25.0`."""
    return ".".join(str(number) for number in numbers(version)[:2])
