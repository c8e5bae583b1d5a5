"""A model to convert: a Hugging Face folder, a run or a checkpoint of it, one of Megatron-LM's or DeepSpeed's, a GGUF file.

Read tensor by tensor.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import Metadata

from llmtrain.config.lora import LoraConfig, adapted
from llmtrain.config.model import ModelConfig
from llmtrain.config.pretrained import pretrained_tokenizer, pretrained_values, run_folder, trained_adapters
from llmtrain.config.train import CheckpointConfig
from llmtrain.convert.adapters import A, B, added, is_adapter
from llmtrain.convert.companions import copy_companions, token_ids, write_generation
from llmtrain.convert.deepspeed import KINDS, UniversalTensors, is_deepspeed, model_folder, steps_taken
from llmtrain.convert.gguf import read_gguf
from llmtrain.convert.hf_read import CONFIG, model_config
from llmtrain.convert.import_hf import check, left_out
from llmtrain.convert.megatron_files import LATEST
from llmtrain.convert.reading import read_whole
from llmtrain.convert.shapes import canonical_shapes
from llmtrain.convert.stored import StoredTensors
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.data.tokenizer import load as load_tokenizer
from llmtrain.errors import UserError
from llmtrain.tools.megatron_source import open_megatron
from llmtrain.train import checkpoint_state
from llmtrain.train.checkpoint import Checkpointer

FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors(Protocol):
    """Weights on demand, by canonical name."""

    names: list[str]

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and stored format; reads nothing."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU."""


@dataclass
class ModelSource:
    """An open model; `tensors` are valid while it is open."""

    path: Path
    kind: str
    """hf, native, megatron, deepspeed or gguf."""
    cfg: ModelConfig
    tensors: Tensors
    companions: Path | None
    """Folder of the tokenizer and the small files that travel along."""
    tokenizer: Tokenizer | None = None
    """A run's tokenizer, whose file may have any name."""
    reference: Any = None
    """transformers' own model, where reading needed it."""
    lora: LoraConfig | None = None
    """What adapters a run trained; None without. They are added to `tensors`, and stand on their own in `adapters`."""
    adapters: Tensors | None = None
    moments: dict[str, Tensors] = field(default_factory=dict)
    """exp_avg and exp_avg_sq, under the weights' names, where the source has them."""
    steps: int = 0
    """Optimizer steps that the moments have seen."""
    left_out: str | None = None
    """What to say of weights that have no place here."""

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(canonical name, whole tensor), one at a time."""
        for name in self.tensors.names:
            tensor = self.tensors.read(name)
            yield name, tensor.to(dtype or tensor.dtype)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(self.tensors.describe(name)[0]).numel() for name in self.tensors.names)


@contextmanager
def open_source(path: str | Path) -> Iterator[ModelSource]:
    """Open the model in `path`. Raises UserError for what is none or cannot be read, before any tensor is."""
    path = Path(path)
    with ExitStack() as stack:
        if path.suffix == ".gguf" or (path.is_file() and path.open("rb").read(4) == b"GGUF"):
            yield _gguf(path, stack)
        elif run := run_folder(path):
            yield _native(path, run)
        elif is_deepspeed(path):
            yield _deepspeed(path)
        elif (path / CONFIG).is_file():
            yield _hugging_face(path, stack)
        elif found := open_megatron(path):
            yield ModelSource(path, "megatron", *found, None, left_out=_heads(path, found[1].left_out))
        else:
            what = "it is none of them" if path.exists() else "there is no such file or folder"
            allowed = "a Hugging Face folder (config.json), a run folder (config.yaml), a .gguf file, a universal checkpoint of DeepSpeed"
            raise UserError(f"{path}: allowed are {allowed}, a checkpoint of Megatron-LM ({LATEST}); {what}")


class _Stored:
    def __init__(self, stored: StoredTensors | UniversalTensors, cfg: ModelConfig):
        self._stored, self._places, self._shapes = stored, check(stored, cfg), canonical_shapes(cfg)
        self.names = list(self._places)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._shapes[name], FORMATS[self._stored.dtype(self._places[name].names[0])]

    def read(self, name: str) -> torch.Tensor:
        return read_whole(self._stored, self._places[name])


def _heads(path: Path, layers: list[str]) -> str | None:
    return (
        f"{path}: heads {', '.join(layers)} of multi-token prediction have a final norm of their own and are left out" if layers else None
    )


def _hugging_face(path: Path, stack: ExitStack) -> ModelSource:
    cfg = model_config(path)
    tensors = _Stored(stack.enter_context(StoredTensors(path)), cfg)
    return ModelSource(path, "hf", cfg, tensors, path, left_out=left_out(path, cfg))


def _deepspeed(path: Path) -> ModelSource:
    companions = model_folder(path)
    cfg, kinds = model_config(companions), {kind: UniversalTensors(path, kind) for kind in KINDS}
    kinds = {kind: stored for kind, stored in kinds.items() if kind == "weight" or stored.names}
    weights, *moments = (_Stored(stored, cfg) for stored in kinds.values())
    named = dict(zip([kind for kind in kinds if kind != "weight"], moments))
    return ModelSource(path, "deepspeed", cfg, weights, companions, moments=named, steps=steps_taken(kinds["weight"]))


class _Checkpoint:
    def __init__(self, path: Path, metadata: Metadata):
        self._path, self._metadata = path, metadata
        self.names = [name.removesuffix(".weight") for name in metadata.state_dict_metadata if name.endswith(".weight")]

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self._metadata.state_dict_metadata[f"{name}.weight"]
        return tuple(entry.size), entry.properties.dtype

    def read(self, name: str) -> torch.Tensor:
        shape, dtype = self.describe(name)
        state = {f"{name}.weight": torch.empty(shape, dtype=dtype)}
        checkpoint_state.read(self._path, state, self._metadata)
        return state[f"{name}.weight"]


class _Merged:
    """Weights of a checkpoint with their adapters added."""

    def __init__(self, stored: _Checkpoint, lora: LoraConfig, cfg: ModelConfig):
        self._stored, self._scale, self._adapted = stored, lora.scale, set(adapted(lora, cfg))
        self.names = [name for name in stored.names if not is_adapter(name)]
        self.describe = stored.describe

    def read(self, name: str) -> torch.Tensor:
        weight, (projection, _, kind) = self._stored.read(name), name.rpartition(".")
        if kind != "weight" or projection not in self._adapted:
            return weight
        return added(weight, *(self._stored.read(f"{projection}.{matrix}") for matrix in (A, B)), self._scale)


def _native(path: Path, run: Path) -> ModelSource:
    found = Checkpointer(run, CheckpointConfig(), writable=False).find("auto" if run.samefile(path) else str(path))
    if found is None:
        raise UserError(f"{path} has no complete checkpoint")
    cfg, lora = ModelConfig.model_validate(pretrained_values(found)), trained_adapters(run)
    tokenizer = pretrained_tokenizer(path)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    companions = None if loaded is None else loaded.path.parent
    stored = _Checkpoint(found, checkpoint_state.read_metadata(found))
    tensors = _Merged(stored, lora, cfg) if lora.rank else stored
    own = {"lora": lora, "adapters": stored} if lora.rank else {}
    return ModelSource(path, "native", cfg, tensors, companions, loaded, **own)


class _Held:
    def __init__(self, weights: dict[str, torch.Tensor]):
        self._weights, self.names = weights, list(weights)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._weights[name].shape), self._weights[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._weights[name]


def _gguf(path: Path, stack: ExitStack) -> ModelSource:
    model, companions = read_gguf(path), None
    if model.tokenizer is not None:
        companions = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model.tokenizer.save_pretrained(companions)
        ids = {f"{name}_token_id": getattr(model.reference.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        write_generation(companions, ids)
    return ModelSource(path, "gguf", model.cfg, _Held(model.weights), companions, reference=model.reference)


def copy_tokenizer(source: ModelSource, folder: Path) -> None:
    """Copy tokenizer and companions into `folder`, token ids included."""
    if source.tokenizer is not None:
        source.tokenizer.copy_to(folder)
    if source.companions is not None:
        copy_companions(source.companions, folder)
        write_generation(folder, token_ids(source.companions))
