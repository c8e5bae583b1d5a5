"""Parameters that one rank holds, stage by stage, as tensor, expert and pipeline parallelism leave them, before ZeRO or FSDP."""

from functools import lru_cache
from typing import NamedTuple

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import attention_parameters, expert_parameters, ffn_parameters
from llmtrain.layout.schedule import placement_of
from llmtrain.layout.schedule_actions import stage_rank
from llmtrain.simulate.case import Case


class Held(NamedTuple):
    """Elements: of experts, which ranks of efsdp share, and of all else."""

    dense: float = 0.0
    experts: float = 0.0

    def plus(self, other: "Held", times: float = 1.0) -> "Held":
        """The sum with `times` the other."""
        return Held(self.dense + times * other.dense, self.experts + times * other.experts)

    @property
    def all(self) -> float:
        """Both."""
        return self.dense + self.experts


def block_held(case: Case, *, dense: bool) -> Held:
    """Of one block."""
    return _block(case.model.of_block(0) if dense else case.model, case.tp, case.ep * case.etp)


def _block(model: ModelConfig, tp: int, shares: int) -> Held:
    narrow = 0.0
    if model.attention.kind == "mla":
        narrow = model.hidden * ((model.attention.query_rank or 0) + model.attention.kv_rank + model.attention.rope_dim)
    attention = narrow + (attention_parameters(model) - narrow) / tp
    norms = model.hidden * (2 if model.norm.placement == "pre" else 4) * (2 if model.norm.kind == "layer_norm" else 1)
    if model.ffn.kind != "moe":
        return Held(attention + norms + ffn_parameters(model) / tp)
    experts = model.ffn.experts * expert_parameters(model)
    return Held(attention + norms + ffn_parameters(model) - experts, experts / shares)


def stage_held(case: Case, stage: int) -> Held:
    """Of one stage, with embedding or head."""
    dense, mixtures = blocks_of(case, stage)
    found = Held()
    if dense:
        found = found.plus(block_held(case, dense=True), dense)
    if mixtures:
        found = found.plus(block_held(case, dense=False), mixtures)
    table = case.model.vocab_size * case.model.hidden / case.tp
    last = stage == case.stages - 1
    tables = (stage == 0) + (last and not (case.model.tie_embeddings and case.stages == 1))
    apart = case.rank_of(0) != case.rank_of(case.stages - 1)
    if last and case.model.mtp.heads:
        head = block_held(case, dense=False).plus(Held(2 * case.model.hidden**2))
        found = found.plus(head, case.model.mtp.heads)
        tables += apart and not case.model.tie_embeddings
    return found.plus(Held(table), tables)


def largest_tensors(case: Case, rank: int) -> Held:
    """Elements of the largest parameter of the pipeline's rank: a table or a dense branch's gates, and the gates of all its experts, which
    lie together."""
    model, own = case.model, stages_of(case, rank)
    gates = 2 if model.ffn.activation == "swiglu" else 1
    wide = model.of_block(0).ffn.hidden if model.ffn.kind != "moe" or model.ffn.dense_layers else model.ffn.shared_hidden
    dense = gates * wide * model.hidden / case.tp
    if 0 in own or case.stages - 1 in own:
        dense = max(dense, model.vocab_size * model.hidden / case.tp)
    experts = gates * model.ffn.hidden * model.hidden * model.ffn.experts / (case.ep * case.etp) if model.ffn.kind == "moe" else 0.0
    return Held(dense, experts)


_RANKS: dict[tuple, tuple[ModelConfig, Held]] = {}
"""The model is kept, so that its number in a key stays its own."""


def rank_held(case: Case, rank: int) -> Held:
    """Of all stages of the pipeline's rank; kept, as many cases share it."""
    model = case.model
    key = (id(model), case.tp, case.ep * case.etp, case.pp, case.virtual, case.kind, case.split, rank)
    if key not in _RANKS:
        if len(_RANKS) > 100_000:
            _RANKS.clear()
        _RANKS[key] = model, _rank_held(case, rank)
    return _RANKS[key][1]


def _rank_held(case: Case, rank: int) -> Held:
    found = Held()
    for stage in stages_of(case, rank):
        found = found.plus(stage_held(case, stage))
    return found


@lru_cache(maxsize=1024)
def _stages(pp: int, virtual: int, kind: str, rank: int) -> tuple[int, ...]:
    return tuple(s for s in range(pp * virtual) if stage_rank(s, ranks=pp, placement=placement_of(kind)) == rank)


def stages_of(case: Case, rank: int) -> tuple[int, ...]:
    """The stages that a rank along pp holds."""
    return _stages(case.pp, case.virtual, case.kind, rank)


def blocks_of(case: Case, stage: int) -> tuple[int, int]:
    """Blocks of a stage with a dense branch, and with experts."""
    count = case.split[stage]
    if case.model.ffn.kind != "moe":
        return count, 0
    first = sum(case.split[:stage])
    dense = max(0, min(count, case.model.ffn.dense_layers - first))
    return dense, count - dense
