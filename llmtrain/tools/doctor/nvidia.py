"""NVIDIA: driver, GPUs, whether torch's binaries fit both, links."""

from collections import Counter
from collections.abc import Mapping

from llmtrain.tools.doctor import pairs, parsers
from llmtrain.tools.doctor.machine import Line, Machine, Verdict

BUSY = 0.1  # share of a GPU's memory in use from which it is worth a note
# For when torch does not see the GPU: those that current builds have dropped.
OLD_GPUS = {"V100": (7, 0), "TITAN V": (7, 0), "P100": (6, 0), "P40": (6, 1), "GTX 10": (6, 1), "GV100": (7, 0)}


def present(machine: Machine) -> bool:
    """Whether this machine seems to have NVIDIA GPUs."""
    return bool(list(machine.at("/proc/driver/nvidia/gpus").glob("*"))) or bool(list(machine.at("/dev").glob("nvidia[0-9]*")))


def lines(machine: Machine, facts: Mapping, *, wanted: bool) -> list[Line]:
    """The verdicts. facts: of `torch_probe`. wanted: --device cuda."""
    answer = machine.run(["nvidia-smi"])
    if not answer.found and not wanted and not present(machine):
        return [Line("nvidia", "devices", Verdict.OK, "none here")]
    if not answer.found:
        fix = "Install NVIDIA's driver; in a container start it with --gpus all (NVIDIA container toolkit)"
        return [Line("nvidia", "nvidia-smi", Verdict.WRONG, "not found", fix)]
    smi = parsers.nvidia_smi(answer.text)
    if not answer.worked or smi is None:
        last = ([line for line in answer.text.splitlines() if line.strip()] or [f"exit code {answer.code}"])[-1].strip()
        fix = "The driver does not answer: reboot after a driver update, or reinstall it; in a container use --gpus all"
        none_here = "No devices were found" in answer.text and not wanted
        return [Line("nvidia", "nvidia-smi", Verdict.NOTE if none_here else Verdict.WRONG, last, fix)]
    names = Counter(gpu.name for gpu in smi.gpus)
    text = ", ".join(f"{count} x {name}" for name, count in names.items()) or "no GPU"
    found = [Line("nvidia", "nvidia-smi", Verdict.OK, f"{text}, driver {smi.driver} (up to CUDA {smi.cuda})")]
    return [*found, *_states(smi), *_torch(smi, facts), *_links(machine, smi)]


def _states(smi: parsers.NvidiaSmi) -> list[Line]:
    found = []
    for gpu in smi.gpus:
        if gpu.ecc:
            text = f"{gpu.ecc} uncorrected memory errors"
            found.append(Line("nvidia", f"GPU {gpu.index}", Verdict.NOTE, text, f"`nvidia-smi -i {gpu.index} -q -d ECC`; reset the GPU"))
    busy = [f"{gpu.index}: {gpu.used} of {gpu.total} MiB" for gpu in smi.gpus if gpu.used > BUSY * gpu.total]
    if busy:
        text = f"memory in use by other processes: {'; '.join(busy)}"
        found.append(Line("nvidia", "GPU memory", Verdict.NOTE, text, "`nvidia-smi` lists the processes; CUDA_VISIBLE_DEVICES picks GPUs"))
    return found


def _torch(smi: parsers.NvidiaSmi, facts: Mapping) -> list[Line]:
    if not smi.gpus or "torch" not in facts:
        return []
    if facts.get("cuda") is None:
        index = "cu126" if parsers.numbers(smi.driver)[0] < 580 or any(_old(gpu.name) for gpu in smi.gpus) else "cu130"
        fix = f"`pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}`, or use --device cpu"
        return [Line("nvidia", "torch", Verdict.WRONG, f"torch {facts['torch']} is built without CUDA and cannot use the GPUs", fix)]
    found = [_judged("CUDA + driver", pairs.cuda_and_driver(facts["cuda"], smi.driver))]
    kinds = {gpu["name"]: tuple(gpu["capability"]) for gpu in facts.get("gpus", [])}
    kinds |= {gpu.name: _old(gpu.name) for gpu in smi.gpus if gpu.name not in kinds and _old(gpu.name)}
    found += [_judged("torch + GPU", pairs.architecture(name, kind, facts.get("architectures", []))) for name, kind in kinds.items()]
    if "cuda_error" in facts or not facts.get("gpus"):
        text = f"torch finds no GPU: {facts.get('cuda_error', 'torch.cuda.device_count() is 0')}"
        fix = "See the lines above; CUDA_VISIBLE_DEVICES may hide them; on NVSwitch machines nvidia-fabricmanager must run"
        found.append(Line("nvidia", "torch", Verdict.WRONG, text, fix))
    return found


def _old(name: str) -> tuple[int, int] | None:
    return next((capability for part, capability in OLD_GPUS.items() if part in name), None)


def _judged(name: str, judgement: pairs.Judgement) -> Line:
    verdict = {True: Verdict.OK, False: Verdict.WRONG, None: Verdict.NOTE}[judgement.fits]
    return Line("nvidia", name, verdict, judgement.text, judgement.fix)


def _links(machine: Machine, smi: parsers.NvidiaSmi) -> list[Line]:
    if len(smi.gpus) < 2:
        return []
    links = parsers.topology(machine.run(["nvidia-smi", "topo", "-m"]).text)
    if not links:
        return []
    kinds = Counter(links.values())
    text = "between GPUs: " + ", ".join(f"{kind} ({count} pairs)" for kind, count in sorted(kinds.items()))
    nvlink = sum(count for kind, count in kinds.items() if kind.startswith("NV"))
    if nvlink == len(links):
        return [Line("nvidia", "links", Verdict.OK, text)]
    hint = "tp and ep belong on GPUs joined by NV#; over SYS, NODE or PHB they are slow"
    return [Line("nvidia", "links", Verdict.NOTE, f"{text}; {hint}")]
