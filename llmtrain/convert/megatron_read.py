"""Canonical weights out of a checkpoint of Megatron-LM or MindSpeed-LLM, whatever its tensor, pipeline and expert parallelism."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.convert.megatron_arguments import Given
from llmtrain.convert.megatron_map import PADDED, Entry, Part, entries
from llmtrain.convert.megatron_model import model_values
from llmtrain.errors import UserError


class MegatronTensors(Protocol):
    """Megatron's parameters of a whole model, by the names of `megatron_map`."""

    args: Mapping[str, Any]
    names: set[str]

    def parts(self, name: str) -> Sequence[Tensor]:
        """What each rank of tensor parallelism holds; one tensor if they are merged already."""

    def part_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of the first of them, and its format; reads nothing."""


# What matters in training alone, or is left out.
_TRAINING = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "seq_aux", "moe_expert_capacity_factor", "mtp_num_layers")


def stored_config(args: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the arguments in a checkpoint describe; UserError if it is none that can be had here."""
    given = {name: value for name, value in args.items() if name not in _TRAINING}
    given |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "apply_layernorm_1p": False, "layernorm_zero_centered_gamma": False}
    problems: list[str] = []
    values = model_values(Given(given), problems.append)
    problems = [text for text in problems if not text.startswith("--noop-layers")]
    if problems:
        raise UserError(f"{where} cannot be imported: {'; '.join(problems)}")
    return ModelConfig.model_validate(values)


class Merged:
    """Weights by canonical name, read when asked for.

    Raises UserError if a parameter of `cfg` is missing, or the checkpoint holds one that has no place in it.
    """

    def __init__(self, cfg: ModelConfig, source: MegatronTensors, where: str):
        self._source, self._centred = source, bool(source.args.get("apply_layernorm_1p"))
        self._vocab = cfg.vocab_size
        self._places: dict[str, list[tuple[Entry, int]]] = {}
        expected = {entry.name: entry for entry in entries(cfg)}
        for entry in expected.values():
            for index, part in enumerate(entry.parts):
                self._places.setdefault(part.name, []).append((entry, index))
        strange = {name for name in source.names - expected.keys() if not name.startswith("mtp.")}
        if missing := sorted(expected.keys() - source.names):
            raise UserError(f"{where} lacks {_some(missing)}" + (f"; it holds {_some(sorted(strange))}" if strange else ""))
        if strange:
            raise UserError(f"{where} holds {_some(sorted(strange))}, which its arguments do not describe")
        self.names = list(self._places)
        self.left_out = sorted({name.split(".")[2] for name in source.names if name.startswith("mtp.layers.")})
        """Heads of multi-token prediction, which have a final norm that ours have not."""

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and stored format of a canonical parameter."""
        entry, index = self._places[name][0]
        shape, dtype = self._source.part_shape(entry.name)
        ranks = len(self._source.parts(entry.name))
        whole = _merge(entry, [torch.empty(shape, dtype=dtype, device="meta") for _ in range(ranks)], self._rows(entry))[index]
        stack = (len(self._places[name]),) if entry.parts[index].expert is not None else ()
        return (*stack, *whole.shape), dtype

    def read(self, name: str) -> Tensor:
        """The whole parameter on the CPU, in the stored format."""
        found = [_merge(entry, self._source.parts(entry.name), self._rows(entry))[index] for entry, index in self._places[name]]
        entry, index = self._places[name][0]
        tensor = found[0] if entry.parts[index].expert is None else torch.stack(found)
        return tensor + 1 if self._centred and name.endswith("norm.weight") else tensor.contiguous()

    def _rows(self, entry: Entry) -> int | None:
        return self._vocab if entry.name in PADDED else None


def _merge(entry: Entry, ranks: Sequence[Tensor], rows: int | None) -> list[Tensor]:
    """The whole parts of one of Megatron's parameters, its first `rows` alone if given."""
    if all(part.dim is None for part in entry.parts):
        # The narrow projections of latent attention are cut where there is no Transformer Engine.
        whole = ranks[0] if len(ranks[0]) >= sum(part.size for part in entry.parts) else torch.cat(list(ranks))
        return entry.split(whole)
    split = [entry.split(tensor) for tensor in ranks]
    merged = [_joined(part, [parts[index] for parts in split]) for index, part in enumerate(entry.parts)]
    return merged if rows is None else [tensor[:rows] for tensor in merged]


def _joined(part: Part, tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 or part.dim is None else torch.cat(tensors, part.dim)


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
