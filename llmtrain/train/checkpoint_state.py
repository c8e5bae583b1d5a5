"""The tensors of a checkpoint: copied to the CPU, written and read by torch.distributed.checkpoint (DCP).

DCP keeps its table of contents, `.metadata`, as a pickle. It is read here by an unpickler that knows the few classes such
a table consists of and refuses everything else; the tensors themselves DCP reads with `torch.load(weights_only=True)`.
"""

import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from llmtrain.train.checkpoint_files import CheckpointError

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

State = dict[str, torch.Tensor]

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP metadata and nothing else."""

    def find_class(self, module: str, name: str):
        """The named class if a DCP table consists of it; `pickle.UnpicklingError` for any other."""
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a checkpoint's table of contents")


def read_metadata(path: Path) -> Metadata:
    """DCP's table of contents of the checkpoint `path`, read without running anything that it may hold."""
    file = path / ".metadata"
    try:
        with open(file, "rb") as stream:
            metadata = MetadataUnpickler(stream).load()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file} refused: {error}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} refused: it holds a {type(metadata).__name__}, not a table of contents")
    return metadata


class Stage:
    """CPU copies of a state's local parts, in buffers that are reused from save to save."""

    def __init__(self):
        self._buffers: State = {}

    def copy(self, state: State) -> State:
        """A copy of each tensor's local part; it is complete and the tensors may change when this returns."""
        kept = {}
        for name, tensor in state.items():
            local = tensor.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            kept[name] = self._buffer(name, local).copy_(local, non_blocking=True)
        self._buffers = kept
        for device in {t.device for t in state.values() if t.device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        return kept

    def _buffer(self, name: str, local: torch.Tensor) -> torch.Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == local.shape and old.dtype == local.dtype:
            return old
        return torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.device.type != "cpu")


class _StagedPlanner(DefaultSavePlanner):
    """Plans from the live tensors' shapes, writes from their staged copies."""

    def __init__(self, plan: SavePlan, staged: State):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged_plan, self._staged = plan, staged

    def create_local_plan(self) -> SavePlan:
        self.plan = self._staged_plan
        return self.plan

    def lookup_object(self, index):
        return self._staged[index.fqn]


class _FileSystem(FileSystem):
    """Raises the OSError of a failed write, which `torch.save` hides behind a complaint about file positions."""

    @contextmanager
    def create_stream(self, path, mode):
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except RuntimeError as error:
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            if hidden is None:
                raise
            raise OSError(hidden.errno, hidden.strerror, str(path)) from error


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path):
        super().__init__(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        self.fs = _FileSystem()

    def storage_meta(self) -> StorageMeta:
        # The default would store this machine's path as a pickled Path, which no reader needs.
        return StorageMeta()


def held_by_all(state: State) -> list[tuple]:
    """Names and shapes of the tensors that are no DTensor; where every rank has the same, each rank writes a part of them."""
    return sorted((name, tuple(tensor.shape)) for name, tensor in state.items() if not isinstance(tensor, DTensor))


def own_part(state: State, *, rank: int, world: int) -> State:
    """What this rank writes of `state`, so that no rank copies and holds what another one writes.

    A sharded tensor's replicas take turns along each mesh axis that replicates it; `world` ranks take turns with plain tensors. Turns are
    counted within each kind: ranks of another pipeline stage have other sharded tensors, and the same plain ones.
    """
    plain = sorted(name for name, tensor in state.items() if not isinstance(tensor, DTensor))
    own = {name: state[name] for turn, name in enumerate(plain) if turn % world == rank}
    for turn, name in enumerate(sorted(state.keys() - set(plain))):
        tensor = state[name]
        mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        replicated = (axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate())
        if place is not None and all(place[axis] == turn % mesh.size(axis) for axis in replicated):
            own[name] = tensor
    return own


def plan(state: State) -> SavePlan:
    """What this rank would write of `state`; holds shapes and offsets, no tensor."""
    return create_default_local_save_plan(state, is_coordinator=True)


def write(folder: Path, local_plan: SavePlan, staged: State, *, group=None, world: int = 1) -> None:
    """Write the staged copies to `folder`, each replicated part once, flushed to the disk; all ranks call it."""
    dcp.save({}, storage_writer=_Writer(folder), planner=_StagedPlanner(local_plan, staged), process_group=group, no_dist=world == 1)


class MetadataReader(dcp.FileSystemReader):
    """Reads the files of a checkpoint by a table of contents that was read already."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        """That table."""
        return self._metadata


def read(path: Path, state: State, metadata: Metadata, *, group=None, world: int = 1) -> None:
    """Fill `state` in place from the checkpoint `path`, whatever the sharding it was saved with; all ranks call it."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(state), storage_reader=MetadataReader(path, metadata), planner=planner, process_group=group, no_dist=world == 1)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def misfits(state: State, metadata: Metadata, names: set[str] | None = None) -> list[str]:
    """Why the checkpoint, or what it holds of `names`, does not fit `state`: names on one side only, other shapes. Empty if it fits."""
    stored = set(metadata.state_dict_metadata) if names is None else names
    problems = []
    if missing := sorted(set(state) - stored):
        problems.append(f"not in the checkpoint: {_some(missing)}")
    if unexpected := sorted(stored - set(state)):
        problems.append(f"only in the checkpoint: {_some(unexpected)}")
    for name in sorted(set(state) & stored):
        entry = metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is not a tensor in the checkpoint")
        elif tuple(entry.size) != tuple(state[name].shape):
            problems.append(f"{name} has shape {list(entry.size)} in the checkpoint and {list(state[name].shape)} in the run")
    return problems


def casts(state: State, metadata: Metadata) -> list[str]:
    """Names that are stored in another dtype than the run's, with both dtypes."""
    both = ((n, metadata.state_dict_metadata[n].properties.dtype, t.dtype) for n, t in sorted(state.items()))
    return [f"{name} ({stored} -> {wanted})".replace("torch.", "") for name, stored, wanted in both if stored != wanted]
