"""Which blocks each stage of a pipeline holds: balanced by cost, or as given.

A stage is a piece of the model, a rank may hold several. Embedding and learned positions go with the first stage; final norm, head,
loss and multi-token prediction with the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import block_matmul_parameters, flops_per_token, mean_keys
from llmtrain.errors import UserError
from llmtrain.layout.schedule_actions import Placement, stage_rank


@dataclass(frozen=True)
class PartCosts:
    """FLOPs of forward and backward per token: of the mean block, the embedding, the head with its loss, and all of multi-token
    prediction."""

    block: float = 1.0
    embedding: float = 0.0
    head: float = 0.0
    mtp: float = 0.0
    blocks: tuple[float, ...] | None = None
    """Of every block, if they are not alike: the dense ones before experts."""

    def of_stages(self, layers: Sequence[int]) -> tuple[float, ...]:
        """The cost of every stage if they hold `layers` blocks."""
        if self.blocks is None:
            inside = [count * self.block for count in layers]
        else:
            ends = list(accumulate(layers))
            inside = [sum(self.blocks[end - count : end]) for end, count in zip(ends, layers)]
        return tuple(cost + extra for cost, extra in zip(inside, self.extras(len(layers))))

    def extras(self, stages: int) -> list[float]:
        """What each stage costs without blocks."""
        extras = [0.0] * stages
        extras[0] += self.embedding
        extras[-1] += self.head + self.mtp
        return extras


def costs(model: ModelConfig, seq_len: int) -> PartCosts:
    """The costs of `model` on sequences of `seq_len` tokens, in closed form; they add up to config's flops_per_token.

    An embedding is a lookup and costs nothing, a head of V entries 6 V D, a head of multi-token prediction a block, the projection from
    2D to D and another pass of the head.

    Raises:
        ConfigError: model.vocab_size is not set.
    """
    heads = model.mtp.heads
    attention = 6.0 * model.attention.heads * (model.head_dim + model.value_head_dim) * mean_keys(model, seq_len)
    block, first = (6.0 * block_matmul_parameters(one) + attention for one in (model, model.of_block(0)))
    dense = 0 if model.ffn.kind == "dense" else model.ffn.dense_layers
    blocks = (*[first] * dense, *[block] * (model.layers - dense))
    rest = flops_per_token(model, seq_len) - sum(blocks)
    head = (rest - heads * (block + 12.0 * model.hidden**2)) / (1 + heads)
    mean = sum(blocks) / model.layers
    return PartCosts(block=mean, embedding=0.0, head=head, mtp=rest - head, blocks=blocks if dense else None)


def split_layers(
    model: ModelConfig,
    stages: int,
    *,
    seq_len: int,
    given: Sequence[int] | None = None,
    ranks: int | None = None,
    placement: Placement = "loop",
) -> tuple[int, ...]:
    """Blocks of each stage of `model`: `given` (parallel.layers_per_stage) if it fits, else balanced by cost.

    Args:
        model: the model.
        stages: parallel.pp x parallel.virtual_stages.
        seq_len: tokens per sequence, for the cost of attention.
        given: blocks per stage, first to last.
        ranks: ranks along pp, `stages` if None; among equally good splits one that is even over ranks is taken.
        placement: how stages lie on ranks, see `schedule.placement_of`.

    Raises:
        UserError: `given` does not fit the model, or the model has too few blocks.
    """
    if given is not None:
        return check_layers(given, layers=model.layers, stages=stages)
    return balance(model.layers, stages, cost=costs(model, seq_len), ranks=ranks, placement=placement)


def balance(
    layers: int, stages: int, *, cost: PartCosts = PartCosts(), ranks: int | None = None, placement: Placement = "loop"
) -> tuple[int, ...]:
    """Blocks of each stage such that the largest cost of a stage is as small as possible, if every block costs the mean of them.

    Every stage but the first and the last has a block at least. Block after block goes to the stage that it leaves cheapest; of equals
    to the one on the rank with the least, then to the later one, as early stages keep the activations of more micro-batches.

    Raises:
        UserError: fewer blocks than stages between the first and the last.
    """
    ranks = stages if ranks is None else ranks
    split = [0] + [1] * (stages - 2) + [0] * (stages > 1)
    if sum(split) > layers:
        raise UserError(
            f"model.layers {layers} is too few for {stages} stages (parallel.pp x parallel.virtual_stages = {ranks} x {stages // ranks}): "
            f"all but the first and the last, {sum(split)}, need a block; lower parallel.pp or parallel.virtual_stages"
        )
    holder = [stage_rank(stage, ranks=ranks, placement=placement) for stage in range(stages)]
    extras = cost.extras(stages)
    loads = rank_totals([extra + count * cost.block for extra, count in zip(extras, split)], ranks=ranks, placement=placement)
    for _ in range(layers - sum(split)):
        best = min(range(stages), key=lambda s: (extras[s] + (split[s] + 1) * cost.block, loads[holder[s]], -s))
        split[best] += 1
        loads[holder[best]] += cost.block
    return tuple(split)


def check_layers(given: Sequence[int], *, layers: int, stages: int) -> tuple[int, ...]:
    """`given` as parallel.layers_per_stage for a model of `layers` blocks.

    Raises:
        UserError: it has not one entry per stage, does not add up to `layers`, or leaves a stage in the middle empty; with the arithmetic.
    """
    name = f"parallel.layers_per_stage {list(given)}"
    if len(given) != stages:
        raise UserError(f"{name} has {len(given)} entries, parallel.pp x parallel.virtual_stages is {stages} stages; give one per stage")
    if sum(given) != layers:
        raise UserError(f"{name}: {' + '.join(map(str, given))} = {sum(given)}, but model.layers is {layers}; change either")
    empty = [stage for stage, count in enumerate(given) if count < (0 < stage < stages - 1)]
    if empty:
        raise UserError(f"{name}: stages {empty} hold no block; only the first and the last stage may, as they hold embedding and head")
    return tuple(given)


def rank_totals(values: Sequence[float], *, ranks: int, placement: Placement = "loop") -> list[float]:
    """The sum over each rank's stages of `values`, one per stage: blocks, costs or bytes."""
    totals = [0 * values[0]] * ranks
    for stage, value in enumerate(values):
        totals[stage_rank(stage, ranks=ranks, placement=placement)] += value
    return totals
