"""Checkpoints of Megatron-LM and MindSpeed-LLM in the layout of one file a rank, `iter_0000100/mp_rank_00_000/model_optim_rng.pt`, opened
without running anything that the files may hold.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where Transformer Engine joins a norm with the projection after it, and the norm's name where it does not."""


class Inert:
    """Stands for whatever a file asks for that is no tensor; takes anything and does nothing."""

    def __init__(self, *given: Any, **named: Any):
        self.given = given

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""

    def __hash__(self) -> int:
        return id(self)


def load_inert(path: Path) -> Any:
    """What `torch.save` wrote to `path`, tensors mapped from the disk; classes that torch does not know become `Inert`, and none of them is
    imported. Raises UserError for a file that cannot be read so."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known: list = [(Namespace if name == "argparse.Namespace" else Inert, name) for name in asked]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = re.search(r"(?m)^(?:.*WeightsUnpickler error: *\n?)?(.*(?:GLOBAL|Unsupported|unsupported).*)$", str(error))
        raise UserError(f"{path} cannot be read: {reason[1] if reason else str(error).splitlines()[0]}") from None


def iteration_folder(path: Path) -> Path | None:
    """The folder of one iteration: `path` itself, or the one that its `latest_checkpointed_iteration.txt` names; None if it is no
    checkpoint of Megatron's."""
    latest = path / LATEST
    if latest.is_file():
        word = latest.read_text().strip()
        path = path / (f"iter_{int(word):07d}" if word.isdigit() else word)
        if not path.is_dir():
            raise UserError(f"{latest} names {word}, but there is no {path}")
    return path if any(path.glob("mp_rank_*")) or (path / "metadata.json").is_file() else None


class _Place(NamedTuple):
    tp: int
    pp: int
    ep: int


class RankFiles:
    """The files of all ranks: `args`, and the parts of each of Megatron's parameters, under its whole-model name."""

    def __init__(self, folder: Path):
        files = {path.name: path for path in sorted(folder.glob("mp_rank_*")) if _RANK.fullmatch(path.name)}
        if not files:
            raise UserError(f"{folder} holds no mp_rank_00 or the like")
        held = {name: load_inert(_file(path)) for name, path in files.items()}
        first = next(iter(held.values()))
        if not isinstance(first, dict) or not isinstance(first.get("args"), Namespace):
            raise UserError(f"{next(iter(files.values()))}: its file holds no `args`, so the model's shape is not known")
        self.folder, self.args = folder, vars(first["args"])
        pipelined = int(self.args.get("pipeline_model_parallel_size") or 1) > 1
        self._parts: dict[str, dict[int, Tensor]] = {}
        experts = int(self.args.get("num_experts") or 0) // int(self.args.get("expert_model_parallel_size") or 1)
        self._collect({_place(n, pipelined): models_of(state, folder / n, experts=experts) for n, state in held.items()})

    @property
    def names(self) -> set[str]:
        """Of all parameters."""
        return set(self._parts)

    def parts(self, name: str) -> list[Tensor]:
        """What the ranks of tensor parallelism hold of a parameter, in their order."""
        return [tensor for _, tensor in sorted(self._parts[name].items())]

    def part_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and format of the first of them."""
        first = self.parts(name)[0]
        return tuple(first.shape), first.dtype

    def _collect(self, models: Mapping[_Place, list[dict[str, Tensor]]]) -> None:
        ranks = 1 + max(place.pp for place in models)
        virtual = len(next(iter(models.values())))
        first = 0
        for stage in range(virtual * ranks):
            chunk, pp = divmod(stage, ranks)
            here = {place: state[chunk] for place, state in models.items() if place.pp == pp}
            for place, state in here.items():
                local = 1 + max((int(m[1]) for m in map(_EXPERT.search, state) if m), default=-1)
                for name, tensor in state.items():
                    self._parts.setdefault(_whole_name(name, first, place.ep * local), {}).setdefault(place.tp, tensor)
            first += 1 + max((int(m[1]) for state in here.values() for m in map(_LAYER.match, state) if m), default=-1)


def _file(folder: Path) -> Path:
    found = [folder / name for name in ("model_optim_rng.pt", "model_rng.pt") if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} holds no model_optim_rng.pt")
    return found[0]


def _place(name: str, pipelined: bool) -> _Place:
    """The ranks that a folder's name gives: the second number is that of experts where there is no pipeline."""
    tp, *rest = (int(number) for number in _RANK.fullmatch(name).groups() if number is not None)
    if len(rest) == 2:
        return _Place(tp, *rest)
    (other,) = rest or (0,)
    return _Place(tp, other, 0) if pipelined else _Place(tp, 0, other)


def models_of(state: dict[str, Any], where: Path, *, experts: int) -> list[dict[str, Tensor]]:
    """The models of a rank, one for each virtual stage, with the names of `plain_names`."""
    names = ["model"] if "model" in state else sorted((key for key in state if re.fullmatch(r"model\d+", key)), key=lambda k: int(k[5:]))
    if not names:
        raise UserError(f"{where}: its file holds no model")
    if any("language_model" in state[name] for name in names):
        raise UserError(f"{where}: a model from before megatron-core (--use-legacy-models); save it with --use-mcore-models")
    return [plain_names(state[name], experts=experts) for name in names]


def plain_names(model: Mapping[str, Any], *, experts: int = 0) -> dict[str, Tensor]:
    """Parameters under the names of layers without Transformer Engine, and each of the `experts` of this rank by itself."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor) or name.endswith("_extra_state"):
            continue
        for fused, apart in _FUSED_NORMS.items():
            name = name.replace(fused, apart)
        found |= _expert_names(name, tensor, experts)
    return found


def _expert_names(name: str, tensor: Tensor, experts: int) -> dict[str, Tensor]:
    if match := re.fullmatch(r"(.*\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)", name):  # Transformer Engine's grouped products
        return {f"{match[1]}.local_experts.{match[4]}.{match[2]}.{match[3]}": tensor}
    if match := re.fullmatch(
        r"(.*\.experts)\.weight([12])", name
    ):  # GroupedMLP: all experts in one, [D, E F] that is [E,D,F], and [E F, D]
        stack = (
            tensor.view(experts, -1, tensor.numel() // experts // tensor.shape[0])
            if match[2] == "1"
            else tensor.unflatten(0, (experts, -1))
        )
        return {f"{match[1]}.local_experts.{e}.linear_fc{match[2]}.weight": matrix.t() for e, matrix in enumerate(stack)}
    return {name: tensor}


def _whole_name(name: str, layer: int, expert: int) -> str:
    """The name with the numbers that layer and expert have in the whole model."""
    name = _LAYER.sub(lambda m: f"decoder.layers.{layer + int(m[1])}.", name, count=1)
    return _EXPERT.sub(lambda m: f".experts.local_experts.{expert + int(m[1])}.", name, count=1)
