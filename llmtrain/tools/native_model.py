"""A converted model as a run folder: config.yaml, tokenizer, and a checkpoint of step 0 with weights, and with moments if there are any."""

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

    def __init__(self, read: Callable[[str], torch.Tensor], steps: int):
        self._read, self._steps = read, steps

    def copy(self, state: dict[str, torch.Tensor]) -> "_Streamed":
        return self

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.tensor(self._steps) if key == "step" else self._read(key)


def write_native(source: ModelSource, folder: Path, *, final: Path, dtype: torch.dtype | None, seen: Callable[[int], None]) -> None:
    """Write `source` into the empty `folder`, which will be called `final`; `seen` is told the elements of each weight written.

    Moments are stored with the number of steps that they have seen; the run itself is at step 0, since its data and schedule are new.
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

    def read(key: str) -> torch.Tensor:
        name, kind = key.rsplit(".", 1)
        tensor = kinds[kind].read(name)
        if kind == "weight":
            seen(tensor.numel())
        return tensor.to(state[key].dtype).contiguous()

    kinds, state = {"weight": source.tensors} | source.moments, {}
    for kind, tensors in kinds.items():
        for name in tensors.names:
            shape, stored = tensors.describe(name)
            wanted = dtype if kind == "weight" and dtype is not None and not keeps_format(name) else stored
            state[f"{name}.{kind}"] = torch.empty(shape, dtype=wanted, device="meta")
    state["step"] = torch.tensor(0)
    spikes = SpikeDetector(GuardsConfig().spike).state()
    meta = {"step": 0, "position": 0, "tokens": 0, "engine": {}, "spikes": spikes, "loss": None}
    meta |= {} if source.moments else {"weights_only": True}
    stage = _Streamed(read, source.steps)
    checkpointer = Checkpointer(folder, CheckpointConfig(asynchronous=False), log=lambda _: None, stage=stage)
    checkpointer.save(0, state, meta)
    if checkpointer.failed:
        raise UserError(f"{final} cannot be written: {checkpointer.failed}")


def _loads(folder: Path) -> bool:
    try:
        load(folder)
    except DataError:
        return False
    return True
