"""A tiny model whose step is run under the recorder."""

from pathlib import Path

import pytest
import torch

from llmtrain.ops import register
from llmtrain.ops.registry import unregister
from llmtrain.tools.compare import measure
from llmtrain.tools.compare.side import Side, read_side, run_side

CONFIG = """
device: cpu
model:
  layers: 3
  hidden: 32
  vocab_size: 97
  attention: {heads: 4, kv_heads: 2, qk_norm: true}
  ffn: {hidden: 48}
  norm: {placement: depth_scaled_sandwich}
  init: {kind: tiny}
train: {steps: 4, seq_len: 48, global_batch: 9, micro_batch: 3}
"""
MOE = """
extends: dense.yaml
model: {ffn: {kind: moe, hidden: 24, experts: 8, top_k: 2}}
"""


@pytest.fixture
def plant():
    """`plant(op, function)` registers a faulty implementation of an op as `kernels.OP=faulty` for the test."""
    planted = []

    def add(op, function):
        register(op, "faulty", speed=-9)(function)
        planted.append(op)

    yield add
    for op in planted:
        unregister(op, "faulty")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """dense.yaml and moe.yaml, without data: tokens are random."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    (folder / "dense.yaml").write_text(CONFIG)
    (folder / "moe.yaml").write_text(MOE)
    return folder


class Laboratory:
    """Sides of one configuration, measured; the runs that all of them need are made once."""

    def __init__(self, source: Path):
        self.source, self.runs = source, {}

    def side(self, words: str = "", **options) -> Side:
        return read_side(self.source, [], words, **options)

    def auxiliary(self, side: Side, compute: str):
        if compute not in self.runs:
            self.runs[compute] = run_side(measure.on_cpu(side, compute))
        return self.runs[compute]

    def trace(self, words: str = "", **options):
        """The measured trace of a side."""
        side = self.side(words)
        trace = run_side(side, **options)
        if not options:
            reference, control = self.auxiliary(side, "fp64"), self.auxiliary(side, side.cfg.precision.compute)
            measure.measure(trace, reference=reference, control=control)
        return trace


@pytest.fixture(scope="session")
def dense(folder) -> Laboratory:
    return Laboratory(folder / "dense.yaml")


@pytest.fixture(scope="session")
def mixture(folder) -> Laboratory:
    return Laboratory(folder / "moe.yaml")


@pytest.fixture(scope="session")
def plain(dense):
    """The side without a fault."""
    return dense.trace()
