"""Which implementations the axes of a mesh use, from the configuration: the same answer on every rank."""

from typing import NamedTuple

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.device.dtypes import torch_dtype
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.ep_fused import choose_ep
from llmtrain.parallel.ops.choice import Chosen, choose_implementation
from llmtrain.parallel.ops.implementations import Demand
from llmtrain.parallel.ops.npu_limits import ExchangeDemand


class Choices(NamedTuple):
    """What `parallel.tp_kind` and `parallel.ep_kind` mean for a run; None where the mesh has no such axis."""

    tp: Chosen | None
    ep: Chosen | None

    def __str__(self) -> str:
        return ", ".join(f"{axis} {chosen}" for axis, chosen in self._asdict().items() if chosen is not None)


def choices(cfg: RunConfig, shape: MeshShape, *, device: str, hardware: str | None = None) -> Choices:
    """For `device` (cpu, cuda, npu) and the key of llmtrain.hardware, if it is known.

    Raises UserError for a named kind that cannot serve.
    """
    dtype, parallel = torch_dtype(cfg.precision.compute), cfg.parallel
    tp = ep = None
    if shape.tp > 1:
        sums = tuple(sorted({*lengths_of_sums(cfg.model, shape.tp), *([cfg.lora.rank] if cfg.lora.rank else [])}))
        tp = choose_implementation(parallel.tp_kind, Demand(device, shape.tp, sums, dtype, hardware))
    if shape.ep > 1:
        kind = "all_to_all" if parallel.overlap_micro_batches and parallel.ep_kind == "auto" else parallel.ep_kind
        ep = choose_ep(kind, _exchange(cfg, shape, device=device, hardware=hardware), cfg.model.ffn, cfg.train)
        if shape.ep_inner is not None:
            ep = ep._replace(reason=f"{shape.ep_outer} nodes of {shape.ep_inner} ranks")
    return Choices(tp, ep)


def lengths_of_sums(cfg: ModelConfig, ranks: int) -> tuple[int, ...]:
    """Over how many numbers the products beside collectives sum on each of `ranks` ranks of tp, forward and backward."""
    a, heads = cfg.attention, cfg.attention.heads // ranks
    if a.kind == "mla":
        keys = heads * (a.nope_dim + a.value_dim)
        sums = {a.query_rank or cfg.hidden, a.kv_rank, heads * cfg.head_dim, keys, heads * a.value_dim}
    else:
        projections = (heads + 2 * max(cfg.kv_heads // ranks, 1)) * cfg.head_dim
        sums = {cfg.hidden, heads * cfg.head_dim, projections}
    widths = [cfg.ffn.hidden] if cfg.ffn.kind == "dense" else [cfg.of_block(0).ffn.hidden] if cfg.ffn.dense_layers else []
    for width in widths:
        expanding = 2 if cfg.ffn.activation == "swiglu" else 1
        sums |= {width // ranks, expanding * width // ranks}
    return tuple(sorted(sums))


def _exchange(cfg: RunConfig, shape: MeshShape, *, device: str, hardware: str | None) -> ExchangeDemand:
    ffn, dtype = cfg.model.ffn, torch_dtype(cfg.precision.compute)
    # With etp the ranks of tp gather their tokens before they are sent.
    shared_by = shape.cp * (shape.tp if shape.etp == 1 else 1)
    tokens = {phase.micro_batch * phase.seq_len // shared_by for phase in StepPlan.from_config(cfg).phases}
    return ExchangeDemand(
        device=device,
        ranks=shape.ep,
        experts=ffn.experts,
        widths=(ffn.descend or cfg.model.hidden, ffn.hidden // shape.etp),
        choices=ffn.top_k,
        sent=tuple(sorted(count * ffn.top_k * (ffn.descend or cfg.model.hidden) * dtype.itemsize for count in tokens)),
        dtype=dtype,
        hardware=hardware,
    )
