"""Memory in closed form, against what the arithmetic of shards says of every rank."""

from math import prod

import pytest

from llmtrain.config.load import load
from llmtrain.config.memory import memory_estimate
from llmtrain.config.parameters import count_parameters
from llmtrain.config.run import RunConfig
from llmtrain.layout.mesh import AXES, MeshShape
from llmtrain.layout.shards import Shards


def test_memory_of_a_shard():
    run = load(None, ["--model", "llama3_8b", "--parallel.dp_shard", "-1"]).run
    alone, eight = memory_estimate(run, 1), memory_estimate(run, 8)
    assert alone["parameters"] == 4 * 8_030_261_248 and eight["parameters"] == alone["parameters"] / 8
    assert eight["optimizer moments"] == 2 * eight["parameters"]


def computed_with(run: RunConfig, shape: MeshShape) -> float:
    """Parameters that a rank of a pipeline holds when all are gathered, the mean over its ranks."""
    found = 0
    for pp in range(shape.pp):
        shards = Shards(run, shape, rank=shape.rank(dict.fromkeys(AXES, 0) | {"pp": pp}))
        units = [unit for stage in shards.stages() for unit in shards.units(stage)]
        found += sum(prod(weight.shape) for unit in units for weight in unit.weights)
    return found / shape.pp


MIXED = ["--model", "pangu_ultra_moe_718b", "--precision", "bf16", "--train.global_batch", "48"]


@pytest.mark.parametrize(
    "words",
    [
        ["--parallel.pp", "16", "--parallel.virtual_stages", "2", "--parallel.tp", "8", "--parallel.dp_shard", "12", "--parallel.ep", "32"],
        ["--parallel.pp", "4", "--parallel.dp_shard", "4"],
        ["--parallel.pp", "3", "--parallel.tp", "4", "--parallel.etp", "4", "--parallel.dp_shard", "2"],
        ["--parallel.dp_shard", "24", "--parallel.tp", "2", "--parallel.ep", "16", "--no-parallel.reshard_after_forward"],
    ],
    ids=lambda words: " ".join(word.removeprefix("--parallel.") for word in words),
)
def test_what_a_pipeline_keeps_gathered_and_the_gradients_of_several_micro_batches(words):
    run = load(None, [*MIXED, *words]).run
    shape = MeshShape.from_config(run.parallel)
    estimate, held = memory_estimate(run, shape.world), computed_with(run, shape)
    assert estimate["gathered layers"] == pytest.approx(2 * held, rel=1e-3)  # norms of blocks are left out
    batch = run.train.global_batch // shape.dp
    expected = held if batch > 1 else count_parameters(run.model)["total"] / (shape.pp * shape.fsdp * shape.tp)
    assert estimate["gradients"] == pytest.approx(4 * expected, rel=1e-3)


def test_gradients_of_one_micro_batch_are_sharded_at_once():
    words = ["--model", "llama3_8b", "--parallel.dp_shard", "8", "--train.micro_batch", "2"]
    one, two = (load(None, [*words, "--train.global_batch", batch]).run for batch in ("16", "32"))
    assert memory_estimate(two, 8)["gradients"] == pytest.approx(8 * memory_estimate(one, 8)["gradients"], rel=1e-3)
    ramp = "[{steps: 5, batch: 16}, {steps: 5, batch: [{from_tokens: 0, size: 16}, {from_tokens: 9, size: 32}]}]"
    ramped = load(None, [*words, "--train.phases", ramp]).run
    assert memory_estimate(ramped, 8)["gradients"] == memory_estimate(two, 8)["gradients"]


def test_memory_on_the_host_is_no_part_of_a_devices():
    words = ["--model", "llama3_8b", "--optim.offload", "--train.offload", "[block_input]"]
    plain, away = (memory_estimate(load(None, given).run, 1) for given in (words[:2], words))
    total = "total without activations inside blocks"
    assert away["moments on the host"] == plain["optimizer moments"] and away["optimizer moments"] == plain["optimizer moments"] * 3 / 16
    assert away["block inputs on the host"] == plain["block inputs"] and away["block inputs"] == plain["block inputs"] * 2 / 32
    freed = plain["optimizer moments"] * 13 / 16 + plain["block inputs"] * 30 / 32
    assert plain[total] - away[total] == pytest.approx(freed) and list(plain)[-1] == total


def test_adapters_alone_have_gradients_and_moments():
    words = ["--model", "llama3_8b", "--parallel.dp_shard", "8"]
    whole, lora = (memory_estimate(load(None, [*words, *more]).run, 8) for more in ([], ["--lora.rank", "16"]))
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # q, o; k, v; gate, up, down
    assert lora["optimizer moments"] == 2 * 4 * adapters / 8
    assert lora["gradients"] == pytest.approx(4 * adapters / (1 if whole["gradients"] > whole["parameters"] else 8))
    assert lora["parameters"] == whole["parameters"] + 4 * adapters / 8
