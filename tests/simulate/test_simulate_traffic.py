"""The sends that are priced, against `layout/traffic.py`, which tests count in real worlds."""

from collections import Counter
from pathlib import Path

import pytest

from llmtrain.config.run import RunConfig
from llmtrain.hardware import load
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.traffic import sent, traffic
from llmtrain.simulate.blocks import block_work, embedding_work, head_work
from llmtrain.simulate.case import Case
from llmtrain.simulate.held import blocks_of, stages_of
from llmtrain.simulate.links import group
from llmtrain.simulate.of_config import case_of, longest
from llmtrain.simulate.work import Work

CONFIGS = Path(__file__).parents[2] / "configs"
NONE = ["--train.recompute", "none"]
LATENT = [*NONE, "--model.mtp.heads", "0"]
RUNS = [
    ("pangu_ultra_135b", 8192, []),
    ("pangu_ultra_135b", 8192, NONE),
    ("pangu_ultra_moe_718b", 6144, LATENT),
    ("pangu_ultra_moe_718b", 6144, [*LATENT, "--parallel.ep_kind", "hierarchical", "--parallel.ep_inner", "8"]),
    ("mixtral_8x7b", 16, [*NONE, "--parallel.tp", "2", "--parallel.dp_shard", "8", "--parallel.ep", "4", "--parallel.etp", "2"]),
    *(("qwen3_8b", 8, [*NONE, "--parallel.cp", "4", "--parallel.dp_shard", "2", "--parallel.cp_kind", kind])
      for kind in ("all_gather", "ring", "ulysses")),
]  # fmt: skip


def priced(case: Case, rank: int) -> Counter:
    """Bytes that a rank sends in a step, by axis."""
    found: Counter = Counter()

    def add(work: Work, times: int) -> None:
        for send in work.forward_sends + work.backward_sends + work.again_sends:
            found[send.axis] += times * sent(send.kind, send.size, group(case, send.axis).ranks)

    for stage in stages_of(case, rank):
        for count, dense in zip(blocks_of(case, stage), (True, False)):
            if count:
                add(block_work(case, dense=dense), count * case.micros)
        if stage == 0:
            add(embedding_work(case), case.micros)
        if stage == case.stages - 1:
            add(head_work(case), case.micros)
    return +found


@pytest.mark.parametrize(("name", "devices", "words"), RUNS, ids=lambda value: value if isinstance(value, str) else None)
def test_sends_are_the_bytes_of_a_run(name, devices, words):
    cfg = RunConfig.load(str(CONFIGS / f"{name}.yaml"), words)
    case, shape = case_of(cfg, load("ascend-910b"), devices), MeshShape.from_config(cfg.parallel, world=devices, local=8)
    for rank in {0, case.pp // 2}:
        wanted: Counter = Counter()
        for row in traffic(cfg, shape, longest(cfg), rank=rank * shape.world // shape.pp):
            wanted[row.axis] += row.bytes
        found = priced(case, rank)
        assert found and all(size == pytest.approx(wanted[axis], rel=0.01) for axis, size in found.items()), (rank, found, wanted)
