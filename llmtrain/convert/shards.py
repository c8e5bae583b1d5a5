"""Named tensors as safetensors shards, streamed."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file


class ShardWriter:
    """Writes tensors into `folder` in the order given, holding one shard at most.

    One shard becomes `model.safetensors`; several are numbered and listed in `model.safetensors.index.json`.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.sizes: dict[str, int] = {}
        """Elements of every tensor written, by name."""
        self.dtypes: dict[str, torch.dtype] = {}
        """Number format of every tensor written, by name."""
        self._held: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write all of `tensors` and finish. Raises ValueError for a name given twice."""
        for name, tensor in tensors:
            if name in self.sizes:
                raise ValueError(f"{name} was given twice")
            if self._held and self._bytes + tensor.nbytes > self.shard_bytes:
                self._flush()
            self._held[name] = tensor
            self.sizes[name] = tensor.numel()
            self.dtypes[name] = tensor.dtype
            self._bytes += tensor.nbytes
        self._flush()
        self._name()

    def _flush(self) -> None:
        save_file(self._held, self.folder / f"shard-{len(self._shards)}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._total += self._bytes
        self._held, self._bytes = {}, 0

    def _name(self) -> None:
        count = len(self._shards)
        files = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for index, file in enumerate(files):
            (self.folder / f"shard-{index}.safetensors").rename(self.folder / file)
        if count > 1:
            where = {name: file for file, names in zip(files, self._shards) for name in names}
            values = {"metadata": {"total_size": self._total}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(values, indent=2) + "\n")
