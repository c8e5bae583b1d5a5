"""DeepSpeed's universal checkpoints of a Hugging Face model: weights, moments and step, parameter by parameter.

`python -m deepspeed.checkpoint.ds_to_universal` makes one of any ZeRO checkpoint: a folder with `zero/NAME/fp32.pt`, `exp_avg.pt` and
`exp_avg_sq.pt` for each parameter. Of ZeRO 1 and 2 they hold `{"param": tensor}`, with the number of steps in `step.pt`; of ZeRO 3 flat
tensors, whose shapes and steps are in the states of the model beside them. All are pickles, read as tensors and plain values alone.
"""

import pickle
from functools import cache
from pathlib import Path

import torch

from llmtrain.convert.hf_read import CONFIG
from llmtrain.errors import UserError

KINDS = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What canonical state calls them -> the file."""
CONVERT = "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {0} --output_folder {0}_universal"


class UniversalTensors:
    """One kind of tensor of a universal checkpoint, with the interface of `StoredTensors`.

    transformers stacks experts in memory from 5 on, [E,2F,D] and [E,D,F]; they are given as in its files, expert by expert.
    """

    def __init__(self, folder: Path, kind: str = "weight"):
        self.folder, self._file = folder, f"{KINDS[kind]}.pt"
        self._open, self._shapes = cache(self._opened), cache(self._model_shapes)
        self._where: dict[str, tuple[str, tuple]] = {}
        for path in (folder / "zero").glob(f"*/{self._file}"):
            self._where |= self._parts(path.parent.name)
        self.names = set(self._where)

    def _parts(self, name: str) -> dict[str, tuple[str, tuple]]:
        """Names that the tensor of this name is given under, with the part of it that each means."""
        before, stack, which = name.partition(".experts.")
        if not stack or which not in ("gate_up_proj", "down_proj"):
            return {name: (name, ())}
        experts, rows, _ = self._open(name).shape
        halves = {"gate_proj": slice(rows // 2), "up_proj": slice(rows // 2, rows)} if which == "gate_up_proj" else {which: slice(rows)}
        return {f"{before}.experts.{e}.{part}.weight": (name, (e, half)) for e in range(experts) for part, half in halves.items()}

    def _opened(self, name: str) -> torch.Tensor:
        held = _load(self.folder / "zero" / name / self._file)
        tensor = held.get("param") if isinstance(held, dict) else held
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            raise UserError(f"{self.folder / 'zero' / name / self._file} holds no fp32 tensor, so it is no universal checkpoint")
        if isinstance(held, dict):
            return tensor
        if (shape := self._shapes().get(name)) is None:
            raise UserError(f"{self.folder}: {name} is flat, and no *_model_states.pt says its shape")
        return tensor[: shape.numel()].view(shape)

    def _model_shapes(self) -> dict[str, torch.Size]:
        return {name: shape for group in _model_states(self.folder).get("param_shapes") or () for name, shape in group.items()}

    def _view(self, name: str) -> torch.Tensor:
        whole, part = self._where[name]
        return self._open(whole)[part]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, whose file is mapped."""
        return tuple(self._view(name).shape)

    def dtype(self, name: str) -> str:
        """As safetensors writes it."""
        return "F32"

    def whole(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        return self._view(name).clone()

    def part(self, name: str, ranges: list[tuple[int, int]]) -> torch.Tensor:
        """Elements first to last (exclusive) along every dim."""
        return self._view(name)[tuple(slice(first, last) for first, last in ranges)].clone()


def is_deepspeed(path: Path) -> bool:
    """Whether the folder is a checkpoint of DeepSpeed, universal or its own."""
    return (path / "zero").is_dir() or any(path.glob("*_optim_states.pt"))


def model_folder(path: Path) -> Path:
    """Where config.json and the tokenizer are: beside the universal checkpoint, as the Trainer has it, or in it.

    Raises UserError for a checkpoint that is not universal, with the command that makes it so, and without a config.json.
    """
    if not (path / "zero").is_dir():
        raise UserError(
            f"{path} is DeepSpeed's own checkpoint, whose pieces depend on its ranks. Make it universal: {CONVERT.format(path)}"
        )
    found = next((folder for folder in (path, path.parent) if (folder / CONFIG).is_file()), None)
    if found is None:
        raise UserError(f"{path}: the model's {CONFIG} is neither there nor in {path.parent}; copy it there")
    return found


def steps_taken(tensors: UniversalTensors) -> int:
    """Optimizer steps that the moments have seen. Raises UserError where parameters disagree, or nothing says it."""
    steps = {int(_load(file)) for file in (tensors.folder / "zero").glob("*/step.pt")}
    if len(steps) > 1:
        raise UserError(f"{tensors.folder}: parameters have taken different numbers of steps, {sorted(steps)}")
    states = {} if steps else _model_states(tensors.folder)
    if not steps and "global_steps" not in states:
        raise UserError(f"{tensors.folder}: neither a step.pt nor a *_model_states.pt says how many steps were taken")
    return steps.pop() if steps else states["global_steps"] - states.get("skipped_steps", 0)


def _model_states(folder: Path) -> dict:
    """What DeepSpeed stores of the model beside its parameters; {} if there is no such file."""
    file = next(iter(sorted(folder.glob("*_model_states.pt"))), None)
    return {} if file is None else _load(file)


def _load(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{file} cannot be read as plain tensors: {str(error).splitlines()[0]}") from None
