"""Memory of one rank by part, in closed form. Needs no torch."""

from llmtrain.config.lora import adapter_parameters
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import BYTES, attention_parameters, count_parameters, expert_parameters, ffn_parameters, loss_rows
from llmtrain.config.run import RunConfig
from llmtrain.config.sparing import MOMENT_SLICES


def memory_estimate(run: RunConfig, world: int) -> dict[str, float]:
    """Bytes on one rank by part, the mean over ranks in closed form; a lower bound, as the activations inside a block depend on kernels and
    recomputation. What optim.offload and train.offload keep on the host comes after the total, of which it is no part.

    Args:
        run: the run; parameters and moments are divided over dp_shard x cp x tp x pp, and so are gradients in steps of one micro-batch;
            those of several are added up whole before they are reduced. With adapters they alone have gradients and moments.
        world: number of ranks, from which dp_shard -1 follows.
    """
    p, model, train = run.parallel, run.model, run.train
    shard = p.dp_shard if p.dp_shard != -1 else max(1, world // (p.pp * p.dp_replicate * p.cp * p.tp))
    counts, split, shared = count_parameters(model), shard * p.cp * p.tp * p.pp, shard * p.cp > 1
    compute, seq_len = BYTES[run.precision.compute], max([x.seq_len or train.seq_len for x in train.phases] or [train.seq_len])
    largest = max(_held_of(run, model), (counts["head"] or counts["embedding"]) / p.tp)
    kept = p.pp > 1 or not p.reshard_after_forward  # a pipeline would gather every block again for each micro-batch
    whole = shared and _accumulates(run, shard * p.dp_replicate)
    adapters = adapter_parameters(run.lora, model)
    trained, added_up = (adapters, adapters / (p.tp * p.pp)) if adapters else (counts["total"], _held(run))
    moments = 2 * trained * BYTES[run.precision.optimizer] / split
    inputs = model.layers / p.pp * train.micro_batch * seq_len / p.cp * model.hidden * compute
    parts = {
        "parameters": (counts["total"] + adapters) * BYTES[run.precision.params] / split,
        "gradients": (added_up if whole else trained / split) * BYTES[run.precision.accumulate],
        "optimizer moments": moments * (3 / MOMENT_SLICES if run.optim.offload else 1),
        "gathered layers": (_held(run) if kept else 2 * largest) * compute if shared else 0.0,
        "logits of one chunk": 2 * loss_rows(model.vocab_size, train.loss_chunk) * model.vocab_size * 4 / p.tp,
        "block inputs": inputs * (min(1.0, 2 * p.pp / model.layers) if "block_input" in train.offload else 1),
    }
    there = {"moments on the host": moments * run.optim.offload, "block inputs on the host": inputs * ("block_input" in train.offload)}
    total = {"total without activations inside blocks": sum(parts.values())}
    return parts | total | {part: size for part, size in there.items() if size}


def _accumulates(run: RunConfig, dp: int) -> bool:
    """Whether any step of `dp` data ranks has several micro-batches, whose gradients are added up whole."""
    sizes = [(run.train.global_batch, run.train.micro_batch)]
    for phase in run.train.phases:
        ramp = phase.batch if isinstance(phase.batch, list) else []
        largest = max((stretch.size for stretch in ramp), default=phase.batch or run.train.global_batch)
        sizes.append((largest, phase.micro_batch or run.train.micro_batch))
    return any(batch > dp * rows for batch, rows in sizes[bool(run.train.phases) :])


def _held(run: RunConfig) -> float:
    """Parameters that a rank computes with, the mean over a pipeline; what multi-token prediction has beside its blocks is left out."""
    p, model, counts = run.parallel, run.model, count_parameters(run.model)
    blocks = sum(_held_of(run, model.of_block(i)) for i in range(model.layers)) + model.mtp.heads * _held_of(run, model)
    return (blocks + (counts["embedding"] + counts["head"]) / p.tp) / p.pp


def _held_of(run: RunConfig, model: ModelConfig) -> float:
    return block_held(model, tp=run.parallel.tp, shares=run.parallel.ep * run.parallel.etp)


def block_held(model: ModelConfig, *, tp: int, shares: int) -> float:
    """Parameters of the block that `model` describes which a rank computes with: tp shares attention from its narrow vectors on and dense
    branches; experts come in `shares` parts (ep x etp)."""
    narrowing = 0
    if model.attention.kind == "mla":
        narrowing = model.hidden * ((model.attention.query_rank or 0) + model.attention.kv_rank + model.attention.rope_dim)
    attention = narrowing + (attention_parameters(model) - narrowing) / tp
    if model.ffn.kind != "moe":
        return attention + ffn_parameters(model) / tp
    experts = model.ffn.experts * expert_parameters(model)
    return attention + ffn_parameters(model) - experts + experts / shares
