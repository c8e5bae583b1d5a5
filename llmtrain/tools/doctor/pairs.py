"""Which versions go together, as their makers publish it, and what that says of this machine.

Every entry names its source by the letter of SOURCES. Nothing here was tried on hardware by this project.
"""

from dataclasses import dataclass

from llmtrain.tools.doctor.parsers import numbers, series

SOURCES = {
    "A": "torch_npu's release notes 26.2.0 (October 2026), tables of versions and of compatibility with CANN",
    "B": "torch_npu's COMPATIBILITY.md, releases 6.0.0 to 26.1.0",
    "C": "torch_npu's release notes 7.2.0, compatibility with CANN",
    "D": "CANN 9.1.0 and 9.1.1 release notes, compatibility of CANN and Ascend HDK",
    "E": "CANN 8.5.0 release notes, CANN and driver versions",
    "F": "ascend-deployer's required HDK per CANN and the Ascend documentation's installation page (package_info.js)",
    "G": "triton-ascend's installation guide",
    "H": "NVIDIA, CUDA minor version compatibility, table 1",
    "I": "pytorch issues 172352 and 175253: CUDA architectures of torch 2.11; issue 190385 for later releases",
    "J": "CANN 9.0.1 release notes, CANN and Ascend HDK versions",
}


@dataclass(frozen=True)
class Release:
    """One torch_npu package: the CANN it was released with, the series of CANN it works with, its Pythons."""

    torch_npu: str
    torch: str
    cann: str
    works_with: tuple[str, ...]
    pythons: tuple[str, ...]
    source: str
    triton_ascend: str = ""


_NEW = ("8.5", "9.0", "9.1", "9.2")
_OLD = ("8.0", "8.1", "8.2", "8.3")
_P310 = ("3.10", "3.11", "3.12", "3.13", "3.14")
_P310_313 = ("3.10", "3.11", "3.12", "3.13")
_P39 = ("3.9", "3.10", "3.11", "3.12", "3.13")
_P39_311 = ("3.9", "3.10", "3.11")
_P38 = ("3.8", "3.9", "3.10", "3.11")

RELEASES = (
    Release("2.14.0", "2.14.0", "9.2.0", _NEW, _P310, "A"),
    Release("2.13.0", "2.13.0", "9.2.0", _NEW, _P310, "A", "3.6.0"),
    Release("2.12.0.post3", "2.12.0", "9.2.0", _NEW, _P310, "A"),
    Release("2.11.0.post3", "2.11.0", "9.2.0", _NEW, _P310, "A"),
    Release("2.10.0.post7", "2.10.0", "9.2.0", _NEW, _P310, "A", "3.6.0"),
    Release("2.9.0.post9", "2.9.0", "9.2.0", _NEW, _P310, "A"),
    Release("2.7.1.post11", "2.7.1", "9.2.0", _NEW, _P39, "A", "3.2.2"),
    Release("2.12.0", "2.12.0", "9.1.0", _NEW, _P310, "AB"),
    Release("2.11.0", "2.11.0", "9.1.0", _NEW, _P310, "AB"),
    Release("2.10.0.post4", "2.10.0", "9.1.0", _NEW, _P310_313, "AB"),
    Release("2.9.0.post6", "2.9.0", "9.1.0", _NEW, _P310_313, "AB"),
    Release("2.7.1.post8", "2.7.1", "9.1.0", _NEW, _P39, "AB"),
    Release("2.9.0.post2", "2.9.0", "9.0.0", _NEW, _P310_313, "AB"),
    Release("2.8.0.post4", "2.8.0", "9.0.0", _NEW, _P39, "AB"),
    Release("2.7.1.post4", "2.7.1", "9.0.0", _NEW, _P39, "AB"),
    Release("2.9.0", "2.9.0", "8.5.0", _NEW, _P310_313, "AB"),
    Release("2.8.0.post2", "2.8.0", "8.5.0", _NEW, _P39, "AB"),
    Release("2.7.1.post2", "2.7.1", "8.5.0", _NEW, _P39, "AB"),
    Release("2.6.0.post5", "2.6.0", "8.5.0", _NEW, _P39_311, "AB"),
    Release("2.8.0", "2.8.0", "8.3.RC1", _OLD, _P39, "BC"),
    Release("2.7.1", "2.7.1", "8.3.RC1", _OLD, _P39, "BC"),
    Release("2.6.0.post3", "2.6.0", "8.3.RC1", _OLD, _P39_311, "BC"),
    Release("2.6.0", "2.6.0", "8.2.RC1", _OLD, _P39_311, "BC"),
    Release("2.5.1.post1", "2.5.1", "8.2.RC1", _OLD, _P39_311, "BC"),
    Release("2.5.1", "2.5.1", "8.1.RC1", _OLD, _P39_311, "BC"),
    Release("2.4.0.post4", "2.4.0", "8.1.RC1", _OLD, _P38, "BC"),
    Release("2.4.0.post2", "2.4.0", "8.0.0", _OLD, _P38, "BC"),
)

DRIVERS: dict[str, tuple[tuple[str, ...], str]] = {
    # CANN series: series of the driver (Ascend HDK) that it works with, oldest first; source
    "9.1": (("25.2", "25.3", "25.5", "25.7", "26.0", "26.1"), "D"),
    "9.0": (("25.0", "25.2", "25.3", "25.5", "25.7", "26.0", "26.1"), "DJ"),
    "8.5": (("25.0", "25.2", "25.3", "25.5", "25.7", "26.0", "26.1"), "DE"),
    "8.3": (("25.3",), "F"),
    "8.2": (("25.0", "25.2"), "F"),
    "8.1": (("24.1", "25.0"), "F"),
    "8.0": (("24.1",), "F"),
}

TRITON_ASCEND = {"3.2.1": ("9.0", "G"), "3.2.0": ("8.5", "G"), "3.6.0": ("9.2", "A"), "3.2.2": ("9.2", "A")}
"""triton-ascend: the series of CANN it was released with."""

CUDA_DRIVERS = {13: (580, "H"), 12: (525, "H"), 11: (450, "H")}
"""Major version of the CUDA that torch was built for: the oldest driver."""


@dataclass(frozen=True)
class Judgement:
    """`fits`: True, False, or None where the table does not know."""

    fits: bool | None
    text: str
    fix: str = ""


def release(torch_npu: str) -> Release | None:
    """The table's entry of a torch_npu version; of a post release that it lacks, none: a post release may want another CANN."""
    return next((entry for entry in RELEASES if entry.torch_npu == torch_npu.split("+")[0]), None)


def newest_for(torch: str) -> Release | None:
    """The newest torch_npu for a torch version; the table lists the newest first."""
    return next((entry for entry in RELEASES if numbers(entry.torch) == numbers(torch)[:3]), None)


def torch_and_torch_npu(torch: str, torch_npu: str) -> Judgement:
    """torch_npu is compiled against one torch release; its own version begins with it (source A, B)."""
    want = ".".join(str(number) for number in numbers(torch_npu)[:3])
    if numbers(torch)[:3] == numbers(torch_npu)[:3]:
        return Judgement(True, f"torch_npu {torch_npu} with torch {torch}")
    other = newest_for(torch)
    keep = f", or keep torch and `pip install torch-npu=={other.torch_npu}`" if other else ""
    return Judgement(False, f"torch_npu {torch_npu} is built for torch {want}, this is torch {torch}", f"`pip install torch=={want}`{keep}")


def torch_npu_and_cann(torch_npu: str, cann: str) -> Judgement:
    """Whether a torch_npu works with a CANN."""
    entry = release(torch_npu)
    if entry is None:
        return Judgement(None, f"torch_npu {torch_npu} is not in the table of pairs; its release notes name its CANN")
    if series(cann) == series(entry.cann):
        return Judgement(True, f"torch_npu {torch_npu} was released with CANN {entry.cann}, this is CANN {cann}")
    works = f"{entry.works_with[0]} to {entry.works_with[-1]}"
    if series(cann) in entry.works_with:
        return Judgement(True, f"torch_npu {torch_npu} was released with CANN {entry.cann} and works with CANN {works}, this is {cann}")
    text = f"torch_npu {torch_npu} works with CANN {works}, this is CANN {cann}"
    if numbers(cann) > numbers(entry.works_with[-1]):
        return Judgement(None, f"{text}: newer than what is published (source {entry.source})")
    other = next((e for e in RELEASES if e.torch == entry.torch and series(cann) in e.works_with), None)
    keep = f", or keep CANN and `pip install torch-npu=={other.torch_npu}`" if other else ""
    return Judgement(False, text, f"Install CANN {entry.cann} (toolkit and ops/kernels){keep}")


def torch_npu_and_python(torch_npu: str, python: str) -> Judgement:
    """Whether there are wheels of a torch_npu for a Python."""
    entry = release(torch_npu)
    if entry is None:
        return Judgement(None, f"torch_npu {torch_npu} is not in the table of pairs")
    pythons = f"{entry.pythons[0]} to {entry.pythons[-1]}"
    text = f"torch_npu {torch_npu} supports Python {pythons}, this is {python}"
    return Judgement(True, text) if series(python) in entry.pythons else Judgement(False, text, f"Use Python {pythons}")


def cann_and_driver(cann: str, driver: str) -> Judgement:
    """Whether a CANN works with a driver. Older drivers than the oldest listed are refused; newer ones are not known."""
    if series(cann) not in DRIVERS:
        return Judgement(None, f"no published table for CANN {cann} and drivers is known here; its release notes have it (driver {driver})")
    known, source = DRIVERS[series(cann)]
    if series(driver) in known:
        return Judgement(True, f"CANN {cann} with driver {driver}")
    text = f"CANN {cann} is published for drivers {', '.join(known)}, this is {driver}"
    if numbers(driver) < numbers(known[0]):
        return Judgement(False, text, f"Install driver and firmware (Ascend HDK) {known[-1]} or an older CANN")
    return Judgement(None, f"{text}: not listed (source {source})")


def driver_and_firmware(firmware: str, allowed: tuple[str, str]) -> Judgement:
    """The range stands in the driver's own version.info."""
    low, high = allowed
    if numbers(low) <= numbers(firmware)[: len(numbers(high))] <= numbers(high):
        return Judgement(True, f"firmware {firmware}, the driver takes {low} to {high}")
    text = f"the driver takes firmware {low} to {high}, this is {firmware}"
    return Judgement(False, text, "Install the firmware of the same Ascend HDK release as the driver, then reboot")


def triton_and_cann(triton_ascend: str, cann: str, torch_npu: str | None) -> Judgement:
    """Whether triton-ascend goes with this CANN and this torch_npu."""
    entry = release(torch_npu) if torch_npu else None
    base = ".".join(str(number) for number in numbers(triton_ascend)[:3])
    if entry and entry.triton_ascend and base != entry.triton_ascend:
        text = f"torch_npu {torch_npu} goes with triton-ascend {entry.triton_ascend}, this is {triton_ascend}"
        return Judgement(False, text, f"`pip install triton-ascend=={entry.triton_ascend}` (after `pip uninstall triton`)")
    if base not in TRITON_ASCEND:
        return Judgement(None, f"triton-ascend {triton_ascend} is not in the table of pairs")
    wanted = TRITON_ASCEND[base][0]
    if series(cann) == wanted:
        return Judgement(True, f"triton-ascend {triton_ascend} with CANN {cann}")
    return Judgement(None, f"triton-ascend {triton_ascend} was released with CANN {wanted}, this is CANN {cann}; nobody lists this pair")


def cuda_and_driver(cuda: str, driver: str) -> Judgement:
    """Whether a driver can serve the CUDA that torch was built for."""
    known = CUDA_DRIVERS.get(numbers(cuda)[0])
    if known is None:
        return Judgement(None, f"CUDA {cuda} is not in the table of pairs (driver {driver})")
    if numbers(driver)[0] >= known[0]:
        return Judgement(True, f"CUDA {cuda} needs driver {known[0]}, this is {driver}")
    text = f"torch is built for CUDA {cuda}, which needs driver {known[0]} or newer; this is {driver}"
    older = numbers(driver)[0] >= CUDA_DRIVERS[12][0]
    other = ", or `pip install torch --index-url https://download.pytorch.org/whl/cu126`" if older else ""
    return Judgement(False, text, f"Update the driver{other}")


def architecture(name: str, capability: tuple[int, int], architectures: list[str]) -> Judgement:
    """Whether torch's binaries have code for a GPU. `architectures`: torch.cuda.get_arch_list()."""
    major, minor = capability
    wanted = f"sm_{major}{minor}"
    same_major = [arch for arch in architectures if arch.startswith(f"sm_{major}") and len(arch) == len(wanted) and arch <= wanted]
    older_ptx = [arch for arch in architectures if arch.startswith("compute_") and int(arch[8:].rstrip("af")) <= major * 10 + minor]
    if same_major or older_ptx:
        return Judgement(True, f"{name} ({wanted}): torch has code for it")
    text = f"{name} is {wanted}; this torch has code for {', '.join(architectures) or 'nothing'}"
    if capability < (7, 5):
        return Judgement(False, text, "`pip install torch --index-url https://download.pytorch.org/whl/cu126` (later builds dropped Volta)")
    return Judgement(False, text, "Install a torch build for this GPU: https://pytorch.org/get-started/locally/ lists them")


def page() -> str:
    """The tables as they stand in docs/doctor.md."""
    head = "| torch_npu | torch | released with CANN | works with CANN | Python | triton-ascend | source |"
    rows = [head, "|---" * 7 + "|"]
    for entry in RELEASES:
        cann, pythons = (f"{values[0]} to {values[-1]}" for values in (entry.works_with, entry.pythons))
        cells = (entry.torch_npu, entry.torch, entry.cann, cann, pythons, entry.triton_ascend or "-", ", ".join(entry.source))
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| CANN | drivers (Ascend HDK) | source |", "|---|---|---|"]
    rows += [f"| {cann} | {', '.join(known)} | {', '.join(source)} |" for cann, (known, source) in DRIVERS.items()]
    rows += ["", "| torch built for CUDA | driver | source |", "|---|---|---|"]
    rows += [f"| {cuda} | {driver} or newer | {source} |" for cuda, (driver, source) in CUDA_DRIVERS.items()]
    rows += ["", "Sources:", "", *(f"- {letter}: {text}" for letter, text in SOURCES.items())]
    return "\n".join(rows) + "\n"
