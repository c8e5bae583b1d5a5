"""A checkpoint of Megatron-LM or MindSpeed-LLM as a model to convert: one file a rank, or megatron-core's distributed format."""

import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from llmtrain.config.model import ModelConfig
from llmtrain.convert.megatron_files import Inert, RankFiles, iteration_folder, load_inert, plain_names
from llmtrain.convert.megatron_read import Merged, stored_config
from llmtrain.errors import UserError
from llmtrain.train.checkpoint_state import MetadataReader, MetadataUnpickler


def open_megatron(path: Path) -> tuple[ModelConfig, Merged] | None:
    """The model in `path`, a folder with `latest_checkpointed_iteration.txt` or one of an iteration; None if it is no such folder.

    Raises UserError for a checkpoint that cannot be read, or holds a model that cannot be had here.
    """
    folder = iteration_folder(path) if path.is_dir() else None
    if folder is None:
        return None
    source = DistributedFiles(folder) if (folder / "metadata.json").is_file() else RankFiles(folder)
    cfg = stored_config(source.args, str(folder))
    return cfg, Merged(cfg, source, str(folder))


class _Unpickler(MetadataUnpickler):
    """Lets what is no part of a table of contents be `Inert`: megatron-core also stores how it was saved."""

    def find_class(self, module: str, name: str):
        """The class of a table of contents, or Inert."""
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return Inert


def _read_metadata(folder: Path) -> Metadata:
    file = folder / ".metadata"
    try:
        with open(file, "rb") as stream:
            metadata = _Unpickler(stream).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{file} holds no table of contents of torch.distributed.checkpoint")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(f"{file} points to {info.relative_path}, which is no file of this checkpoint")
    return metadata


class DistributedFiles:
    """megatron-core's torch_dist: whole tensors in pieces, layers and experts in stacks of their own dims or one by one."""

    def __init__(self, folder: Path):
        self.folder, self._metadata = folder, _read_metadata(folder)
        common = load_inert(folder / "common.pt")
        if not isinstance(common, dict) or not isinstance(common.get("args"), Namespace):
            raise UserError(f"{folder / 'common.pt'} holds no `args`, so the model's shape is not known")
        self.args = vars(common["args"])
        self._where: dict[str, tuple[str, tuple[int, ...]]] = {}
        for stored, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not stored.startswith(("optimizer.", "rng_state", "chained_")):
                self._where |= {name: (stored, at) for name, at in _named(stored.removeprefix("model."), tuple(entry.size))}

    @property
    def names(self) -> set[str]:
        """Of all parameters."""
        return set(self._where)

    def parts(self, name: str) -> list[Tensor]:
        """The parameter, whole."""
        stored, at = self._where[name]
        shape, dtype = self.part_shape(name)
        target = torch.empty((*[1] * len(at), *shape), dtype=dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size((*at, *[0] * len(shape))), sizes=target.shape)
        dcp.load(
            {stored: target},
            storage_reader=MetadataReader(self.folder, self._metadata),
            planner=_Slice(target, chunk),
            no_dist=True,
        )
        return [target.view(shape)]

    def part_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and format of a parameter; reads nothing."""
        stored, at = self._where[name]
        entry = self._metadata.state_dict_metadata[stored]
        return tuple(entry.size)[len(at) :], entry.properties.dtype


def _named(stored: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """(name of a parameter, its place along the stacked dims) of all that a stored tensor holds."""
    stacked = []
    if re.match(r"decoder\.layers\.[a-z]", stored):
        stored, stacked = stored.replace("decoder.layers.", "decoder.layers.{}.", 1), [range(shape[0])]
    if match := re.search(r"\.experts\.experts\.(\d+\.)?", stored):
        expert = match[1] or "{}."
        stored = f"{stored[: match.start()]}.experts.local_experts.{expert}{stored[match.end() :]}"
        stacked += [] if match[1] else [range(shape[len(stacked)])]
    places: list[tuple[int, ...]] = [()]
    for indices in stacked:
        places = [(*place, index) for place in places for index in indices]
    return [(next(iter(plain_names({stored.format(*place): torch.empty(0)}))), place) for place in places]


class _Slice(DefaultLoadPlanner):
    """Reads one box of one tensor."""

    def __init__(self, target: Tensor, chunk: ChunkStorageMetadata):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._target, self._chunk = target, chunk

    def create_local_plan(self) -> LoadPlan:
        ((name, _),) = self.state_dict.items()
        return LoadPlan(create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], [self._chunk]))

    def lookup_tensor(self, index: Any) -> Tensor:
        return self._target
