"""Ascend: devices, driver, firmware, CANN, its environment, links, and whether the versions go together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.tools.doctor import pairs, parsers
from llmtrain.tools.doctor.machine import Line, Machine, Verdict

DRIVER, FIRMWARE = "/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/firmware/version.info"
# CANN 8.5 and later install to cann/, earlier ones to ascend-toolkit/latest; the environment variables are those of set_env.sh.
HOMES = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/nnae/latest")
HOME_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
DEVICE_FILES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
HCCN_TOOL = "/usr/local/Ascend/driver/tools/hccn_tool"
BUSY = 0.1  # share of a device's memory in use from which it is worth a note


@dataclass(frozen=True)
class Cann:
    """A CANN installation. `active`: its set_env.sh was run in this shell."""

    home: str
    version: str | None
    active: bool


def present(machine: Machine) -> bool:
    """Whether this machine seems to have NPUs: a device file, or a driver."""
    return bool(device_files(machine)) or machine.at(DRIVER).exists()


def device_files(machine: Machine) -> list[str]:
    """/dev/davinci0, ..."""
    return sorted(path.name for path in machine.at("/dev").glob("davinci[0-9]*"))


def find_cann(machine: Machine) -> list[Cann]:
    """CANN installations: first the one whose environment is set, then those in the usual folders, each once."""
    set_homes = list(dict.fromkeys(machine.env[name] for name in HOME_VARIABLES if machine.env.get(name)))
    usual = [*HOMES, os.path.join(machine.env.get("HOME", "/root"), "Ascend/ascend-toolkit/latest")]
    found, seen = [], set()
    for home in [*set_homes, *usual]:
        real = machine.at(home).resolve()
        if real.is_dir() and real not in seen:
            seen.add(real)
            found.append(Cann(home, cann_version(machine, home), home in set_homes))
    return found


def cann_version(machine: Machine, home: str) -> str | None:
    """From the files of an installation, the first that has it; None if none does."""
    text = machine.read(f"{home}/version.cfg")
    if text and parsers.version_cfg(text):
        return parsers.version_cfg(text)
    infos = [*sorted(machine.at(home).glob("*-linux/ascend_toolkit_install.info")), machine.at(f"{home}/ascend_toolkit_install.info")]
    for path in infos:
        text = machine.read(f"/{path.relative_to(machine.root)}")
        if text and "version" in parsers.fields(text):
            return parsers.fields(text)["version"]
    for name in ("toolkit", "opp", "runtime", "compiler"):
        values = parsers.fields(machine.read(f"{home}/{name}/version.info") or "")
        if values.get("version_dir") or values.get("Version"):
            return values.get("version_dir") or values["Version"]
    return None


def lines(machine: Machine, facts: Mapping, *, wanted: bool, torch_npu: str | None, triton_ascend: str | None) -> list[Line]:
    """The verdicts. facts: of `torch_probe`. wanted: --device npu; torch_npu, triton_ascend: installed versions."""
    if not (wanted or present(machine) or torch_npu):
        return [Line("ascend", "devices", Verdict.OK, "none here")]
    here = wanted or present(machine)
    smi_lines, driver = _smi(machine, here)
    cann_lines, cann = _cann(machine, here)
    driver = version_of_driver(machine) or driver
    found = [*_devices(machine, here), *smi_lines, *_driver(machine, driver, here), *cann_lines]
    if here and torch_npu is None:
        fix = "`pip install torch-npu` of the torch's version (torch 2.13.0: torch-npu 2.13.0), after CANN"
        found.append(Line("ascend", "torch_npu", Verdict.WRONG, "not installed: torch cannot use the NPUs", fix))
    return [*found, *_pairs(torch_npu, triton_ascend, cann, driver, facts), *_links(machine)]


def version_of_driver(machine: Machine) -> str | None:
    """From the driver's version.info."""
    values = parsers.fields(machine.read(DRIVER) or "")
    return values.get("package_version") or values.get("Version")


def _devices(machine: Machine, here: bool) -> list[Line]:
    devices = device_files(machine)
    if not devices:
        if not here:
            return [Line("ascend", "devices", Verdict.NOTE, "no NPU here, though torch_npu is installed")]
        fix = "On the host: install the driver. In a container: --device /dev/davinci0 ... " + " ".join(
            f"--device {f}" for f in DEVICE_FILES
        )
        return [Line("ascend", "devices", Verdict.WRONG, "no /dev/davinci* here", fix)]
    missing = [path for path in DEVICE_FILES if not machine.at(path).exists()]
    if missing:
        fix = "In a container: " + " ".join(f"--device {path}" for path in missing)
        return [Line("ascend", "devices", Verdict.WRONG, f"{len(devices)} device file(s), but {', '.join(missing)} missing", fix)]
    closed = [name for name in devices if not os.access(machine.at(f"/dev/{name}"), os.R_OK | os.W_OK)]
    if closed:
        fix = "Add the user to the group of the devices: `usermod -a -G HwHiAiUser NAME`, then log in again"
        return [Line("ascend", "devices", Verdict.WRONG, f"no permission for {', '.join(closed)}", fix)]
    return [Line("ascend", "devices", Verdict.OK, ", ".join(devices))]


def _smi(machine: Machine, here: bool) -> tuple[list[Line], str | None]:
    answer = machine.run(["npu-smi", "info"])
    if not answer.found:
        if not here:
            return [], None
        fix = "Install the driver; in a container mount /usr/local/bin/npu-smi and /usr/local/dcmi"
        return [Line("ascend", "npu-smi", Verdict.NOTE, "not found", fix)], None
    smi = parsers.npu_smi(answer.text)
    if not answer.worked or smi is None:
        last = ([line for line in answer.text.splitlines() if line.strip()] or [f"exit code {answer.code}"])[-1]
        fix = (
            "The driver does not answer here: another container may hold the device, device files or /usr/local/Ascend/driver may be "
            "missing in this one, or only root may ask; on the host, `dmesg` and a reboot"
        )
        return [Line("ascend", "npu-smi", Verdict.WRONG, last.strip(), fix)], None
    names = sorted({npu.name for npu in smi.npus})
    found = [Line("ascend", "npu-smi", Verdict.OK, f"{len(smi.npus)} x {', '.join(names)}, driver {smi.version}")]
    for npu in smi.npus:
        if npu.health != "OK":
            fix = f"`npu-smi info -t health -i {npu.card}` says why"
            found.append(Line("ascend", f"NPU {npu.card}.{npu.chip}", Verdict.WRONG, f"health {npu.health} ({npu.bus})", fix))
    busy = [f"{npu.card}.{npu.chip}: {npu.used} of {npu.total} MB" for npu in smi.npus if npu.used > BUSY * npu.total]
    if busy:
        text = f"memory in use by other processes: {'; '.join(busy)}"
        found.append(
            Line("ascend", "NPU memory", Verdict.NOTE, text, "`npu-smi info` lists the processes; ASCEND_RT_VISIBLE_DEVICES picks devices")
        )
    return found, smi.version


def _driver(machine: Machine, driver: str | None, here: bool) -> list[Line]:
    if driver is None:
        text = f"{DRIVER} cannot be read and npu-smi does not say"
        return [Line("ascend", "driver", Verdict.WRONG, text, "Install driver and firmware (Ascend HDK)")] if here else []
    firmware = parsers.fields(machine.read(FIRMWARE) or "").get("Version")
    if firmware is None:
        return [Line("ascend", "driver", Verdict.OK, f"{driver}; firmware not known here ({FIRMWARE})")]
    allowed = parsers.firmware_range(machine.read(DRIVER) or "")
    if allowed is None:
        return [Line("ascend", "driver", Verdict.OK, f"{driver}, firmware {firmware}")]
    return [Line("ascend", "driver", Verdict.OK, driver), _judged("firmware", pairs.driver_and_firmware(firmware, allowed))]


def _cann(machine: Machine, here: bool) -> tuple[list[Line], str | None]:
    installed = find_cann(machine)
    if not installed:
        unset = [f"{name}={machine.env[name]}" for name in HOME_VARIABLES if machine.env.get(name)]
        text = "not found" + (f" ({', '.join(unset)} leads nowhere)" if unset else "")
        fix = "Install CANN (toolkit, and ops/kernels for this chip) and run its set_env.sh: https://www.hiascend.com/cann"
        return [Line("ascend", "CANN", Verdict.WRONG if here else Verdict.NOTE, text, fix)], None
    first, others = installed[0], installed[1:]
    version = first.version or "of unknown version"
    if not first.active:
        fix = f"`source {_set_env(machine, first.home)}`, in every shell and job script that starts a run"
        return [
            Line("ascend", "CANN", Verdict.WRONG, f"{version} in {first.home}, but set_env.sh was not run in this shell", fix)
        ], first.version
    if "/lib64" not in machine.env.get("LD_LIBRARY_PATH", ""):
        fix = f"`source {_set_env(machine, first.home)}`; something has changed LD_LIBRARY_PATH after it"
        return [Line("ascend", "CANN", Verdict.WRONG, f"{version}: its libraries are not in LD_LIBRARY_PATH", fix)], first.version
    found = [Line("ascend", "CANN", Verdict.OK, f"{version} in {first.home}")]
    if others:
        text = f"{version} is used; also installed: {', '.join(f'{c.version} in {c.home}' for c in others)}"
        found.append(Line("ascend", "CANN copies", Verdict.NOTE, text))
    return found, first.version


def _set_env(machine: Machine, home: str) -> str:
    places = (f"{home}/set_env.sh", f"{os.path.dirname(home)}/set_env.sh", f"{home}/bin/setenv.bash")
    return next((place for place in places if machine.at(place).exists()), f"{os.path.dirname(home)}/set_env.sh")


def _pairs(torch_npu: str | None, triton_ascend: str | None, cann: str | None, driver: str | None, facts: Mapping) -> list[Line]:
    found = []
    if torch_npu and facts.get("torch"):
        found.append(_judged("torch + torch_npu", pairs.torch_and_torch_npu(facts["torch"], torch_npu)))
    if torch_npu:
        found.append(_judged("torch_npu + Python", pairs.torch_npu_and_python(torch_npu, facts.get("python", ""))))
    if torch_npu and cann:
        found.append(_judged("torch_npu + CANN", pairs.torch_npu_and_cann(torch_npu, cann)))
    if cann and driver:
        found.append(_judged("CANN + driver", pairs.cann_and_driver(cann, driver)))
    if triton_ascend and cann:
        found.append(_judged("triton-ascend + CANN", pairs.triton_and_cann(triton_ascend, cann, torch_npu)))
    return found


def _judged(name: str, judgement: pairs.Judgement) -> Line:
    verdict = {True: Verdict.OK, False: Verdict.WRONG, None: Verdict.NOTE}[judgement.fits]
    return Line("ascend", name, verdict, judgement.text, judgement.fix)


def _links(machine: Machine) -> list[Line]:
    devices = device_files(machine)
    program = HCCN_TOOL if machine.at(HCCN_TOOL).exists() else "hccn_tool"
    states = {}
    for name in devices:
        answer = machine.run([program, "-i", name.removeprefix("davinci"), "-link", "-g"], patience=5)
        if not answer.found:
            break
        states[name] = parsers.hccn_link(answer.text) or "unknown"
    found = []
    if states:
        down = [f"{name} {state}" for name, state in states.items() if state != "UP"]
        text = f"network ports: {', '.join(down) if down else f'{len(states)} up'}"
        fix = "Needed between nodes only: cable, optics (`hccn_tool -i N -optical -g`), switch port" if down else ""
        found.append(Line("ascend", "links", Verdict.NOTE if down else Verdict.OK, text, fix))
    topology = parsers.topology(machine.run(["npu-smi", "info", "-t", "topo"]).text) if devices else {}
    if topology:
        kinds = sorted(set(topology.values()))
        found.append(Line("ascend", "topology", Verdict.OK, f"between devices: {', '.join(kinds)}"))
    return found
