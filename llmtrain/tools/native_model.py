"""A converted model as a run folder: config.yaml, tokenizer, and a checkpoint of step 0 that holds weights alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from llmtrain.config.data import TokenizerConfig
from llmtrain.config.load import to_yaml
from llmtrain.config.run import RunConfig
from llmtrain.config.train import CheckpointConfig, GuardsConfig
from llmtrain.convert.shapes import keeps_format
from llmtrain.data.errors import DataError
from llmtrain.data.tokenizer import load
from llmtrain.errors import UserError
from llmtrain.tools.model_source import ModelSource, copy_tokenizer
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.guards import SpikeDetector


class _Streamed:
    """Stands in for a copied state: a tensor is read when the writer asks for it, so one is in memory at a time."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        self._read = read

    def copy(self, state: dict[str, torch.Tensor]) -> "_Streamed":
        return self

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.tensor(0) if key == "step" else self._read(key.removesuffix(".weight"))


def write_native(source: ModelSource, folder: Path, *, final: Path, dtype: torch.dtype | None, seen: Callable[[int], None]) -> None:
    """Write `source` into the empty `folder`, which will be called `final`; `seen` is told the elements of each tensor written.

    Raises UserError if the checkpoint cannot be written.
    """
    copy_tokenizer(source, folder / "tokenizer")
    tokenizer = TokenizerConfig()
    if _loads(folder / "tokenizer"):
        tokenizer = TokenizerConfig(path=str((final / "tokenizer").absolute()))
    else:  # generation settings alone would be taken for a broken tokenizer
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    cfg = RunConfig(name=final.name, output=str(final.absolute().parent), model=source.cfg, tokenizer=tokenizer)
    (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")

    def read(name: str) -> torch.Tensor:
        tensor = source.tensors.read(name)
        seen(tensor.numel())
        return tensor.to(state[f"{name}.weight"].dtype).contiguous()

    state = {}
    for name in source.tensors.names:
        shape, stored = source.tensors.describe(name)
        wanted = stored if dtype is None or keeps_format(name) else dtype
        state[f"{name}.weight"] = torch.empty(shape, dtype=wanted, device="meta")
    state["step"] = torch.tensor(0)
    spikes = SpikeDetector(GuardsConfig().spike).state()
    meta = {"step": 0, "position": 0, "tokens": 0, "engine": {}, "spikes": spikes, "loss": None, "weights_only": True}
    checkpointer = Checkpointer(folder, CheckpointConfig(asynchronous=False), log=lambda _: None, stage=_Streamed(read))
    checkpointer.save(0, state, meta)
    if checkpointer.failed:
        raise UserError(f"{final} cannot be written: {checkpointer.failed}")


def _loads(folder: Path) -> bool:
    try:
        load(folder)
    except DataError:
        return False
    return True
