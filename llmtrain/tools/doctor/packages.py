"""Installed packages: versions, copies, names that stand for something else, and folders that hide a package. Nothing is imported."""

import importlib.metadata as metadata
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from llmtrain.engine.megatron_check import ASCEND, VERSIONS, runs
from llmtrain.packages import places, wrong_apex
from llmtrain.tools.doctor.machine import Line, Verdict

SHOWN = ("torch", "torch-npu", "triton", "triton-ascend", "numpy", "transformers", "deepspeed", "megatron-core", "flash-attn", "apex")
ESSENTIAL = ("torch", "torch-npu", "triton", "triton-ascend", "numpy")
# Module names that a run or one of its libraries imports, and that a folder or file of the same name would hide.
MODULES = {
    "torch": "torch",
    "torch_npu": "torch-npu",
    "triton": "triton",
    "numpy": "numpy",
    "yaml": "pyyaml",
    "pydantic": "pydantic",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "megatron": "megatron-core",
    "apex": "apex",
    "flash_attn": "flash-attn",
    "kernels": "kernels",
    "accelerate": "accelerate",
}


def copies(path: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Package name -> (version, folder) of every copy on `path`, in the order in which Python would find them."""
    found = defaultdict(list)
    for folder in dict.fromkeys(str(Path(entry or ".").resolve()) for entry in path):
        for package in metadata.distributions(path=[folder]):
            name = (package.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
            entry = (package.version, folder)
            if entry not in found[name]:
                found[name].append(entry)
    return dict(found)


def version(name: str, path: Sequence[str]) -> str | None:
    """The version of a package that Python would use, or None."""
    found = copies(path).get(name)
    return found[0][0] if found else None


def lines(path: Sequence[str] | None = None) -> list[Line]:
    """The verdicts."""
    path = sys.path if path is None else path
    installed = copies(path)
    found = [Line("packages", name, Verdict.OK, installed[name][0][0]) for name in SHOWN if name in installed]
    if "torch" not in installed:
        fix = "`pip install torch` (Volta: --index-url https://download.pytorch.org/whl/cu126; CPU alone: .../whl/cpu)"
        found.append(Line("packages", "torch", Verdict.WRONG, "not installed", fix))
    return found + _copies(installed) + _triton(installed) + _apex(path) + _megatron(installed) + _hidden(installed, path)


def _copies(installed: dict[str, list[tuple[str, str]]]) -> list[Line]:
    found = []
    for name, entries in installed.items():
        if len(entries) < 2 or (name not in ESSENTIAL and name not in SHOWN):
            continue
        text = "; ".join(f"{number} in {folder}" for number, folder in entries)
        same_folder = len({folder for _, folder in entries}) < len(entries)
        if same_folder or name in ESSENTIAL:
            fix = f"`pip uninstall {name}` until none is left, then install it once (a user-site copy: PYTHONNOUSERSITE=1 hides it)"
            found.append(Line("packages", name, Verdict.WRONG, f"{len(entries)} copies: {text}", fix))
        else:
            found.append(Line("packages", name, Verdict.NOTE, f"{len(entries)} copies, the first is used: {text}"))
    return found


def _triton(installed: dict[str, list[tuple[str, str]]]) -> list[Line]:
    if "triton" not in installed or "triton-ascend" not in installed:
        return []
    text = "triton and triton-ascend are both installed, and both are the folder triton/: the one installed last has overwritten the other"
    fix = "`pip uninstall triton triton-ascend`, then install the one for this machine: triton-ascend for NPUs, triton for GPUs"
    return [Line("packages", "triton", Verdict.WRONG, text, fix)]


def _apex(path: Sequence[str]) -> list[Line]:
    text = wrong_apex(path)
    fix = "`pip uninstall apex`; llmtrain needs no apex. NVIDIA's is built from its source repository"
    return [Line("packages", "apex", Verdict.WRONG, text, fix)] if text else []


def _megatron(installed: dict[str, list[tuple[str, str]]]) -> list[Line]:
    """Whether the engine megatron runs the installed megatron-core."""
    if "megatron-core" not in installed:
        return []
    number = installed["megatron-core"][0][0]
    if "torch-npu" in installed:
        pinned = "which is installed" if number == ASCEND else f"not {number}"
        return [Line("packages", "engine megatron", Verdict.NOTE, f"not on NPUs: MindSpeed pins megatron-core {ASCEND}, {pinned}")]
    if runs(number):
        return [Line("packages", "engine megatron", Verdict.OK, f"runs megatron-core {number}")]
    text = f"does not know megatron-core {number}; `pip install megatron-core=={VERSIONS[0]}` (Python 3.10 and later)"
    return [Line("packages", "engine megatron", Verdict.NOTE, text)]


def _hidden(installed: dict[str, list[tuple[str, str]]], path: Sequence[str]) -> list[Line]:
    """Folders and files that Python takes for a package although the package is installed elsewhere on the path."""
    found = []
    for module, package in MODULES.items():
        specs = places(module, path)
        if len(specs) < 2 or package not in installed:
            continue
        first, homes = _home(specs[0]), {folder for _, folder in installed[package]}
        # A folder without code gives way to a real package further down the path.
        real = next((spec for spec in specs if spec.origin is not None), specs[0])
        if first == _home(real) and str(first.parent.resolve()) not in homes:
            text = f"{first} hides the installed package {package} in {next(iter(sorted(homes)))}"
            fix = "Rename it, take it off PYTHONPATH, or start elsewhere (`python -m` looks into the current folder, `llmtrain` does not)"
            found.append(Line("packages", module, Verdict.WRONG, text, fix))
    return found


def _home(spec: ModuleSpec) -> Path:
    """The folder or file of a module."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or spec.name)
