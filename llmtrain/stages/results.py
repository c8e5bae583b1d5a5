"""What a finished run leaves for people: a passage, exported weights, a baseline to compare with."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from llmtrain.config.lora import adapted
from llmtrain.config.run import RunConfig
from llmtrain.convert.adapters import is_adapter, merged
from llmtrain.engine.base import Engine
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.hang.where import recorded
from llmtrain.parallel.mesh import Mesh


def full_weights(
    engine: Engine, mesh: Mesh, *, everywhere: bool = False, adapters_only: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, whole tensor on the CPU) one at a time: all of the model on rank 0, on others those of their pipeline stages.

    `everywhere`: all of the model on every rank. All ranks must go through it together.
    """
    mine = {key.removesuffix(".weight"): tensor for key, tensor in engine.state().items() if key.endswith(".weight")}
    if adapters_only:
        mine = {name: tensor for name, tensor in mine.items() if is_adapter(name)}
    held = mesh.gather({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()})
    for name, (shape, dtype) in {name: form for part in held for name, form in part.items()}.items():
        whole = mine.get(name)
        if isinstance(whole, DTensor):
            whole = _gathered(whole)
        source = next(rank for rank, part in enumerate(held) if name in part)
        whole = _to_rank_0(whole, source, mesh, shape=shape, dtype=dtype)
        if everywhere and mesh.shape.pp > 1:
            whole = _from_rank_0(whole, mesh, shape=shape, dtype=dtype)
        if whole is not None:
            yield name, whole.cpu()


def _gathered(tensor: DTensor) -> torch.Tensor:
    """As full_tensor, axis by axis: that of FSDP, which splits what tp has split, comes first. PyTorch warns of doing both at once."""
    for axis in range(tensor.device_mesh.ndim):
        tensor = tensor.redistribute(placements=[Replicate()] * (axis + 1) + list(tensor.placements[axis + 1 :]))
    return tensor.to_local()


def _to_rank_0(whole: torch.Tensor | None, source: int, mesh: Mesh, *, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """`whole` as it is, on rank 0 that of rank `source`, the first of another pipeline stage: it differs from rank 0 along pp alone."""
    if source and mesh.rank == source:
        with recorded("send", mesh.group("pp"), peer=0):
            dist.send(whole.contiguous(), dst=0, group=mesh.group("pp"))
    elif source and mesh.rank == 0:
        whole = torch.empty(shape, dtype=dtype, device=mesh.device.torch_device)
        with recorded("recv", mesh.group("pp"), peer=source):
            dist.recv(whole, src=source, group=mesh.group("pp"))
    return whole


def _from_rank_0(whole: torch.Tensor | None, mesh: Mesh, *, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What rank 0 has, on every rank."""
    if mesh.rank:
        whole = torch.empty(shape, dtype=dtype, device=mesh.device.torch_device)
    whole = whole.contiguous()
    with recorded("broadcast", "world"):
        dist.broadcast(whole, src=0)
    return whole


def check_export(cfg: RunConfig) -> None:
    """Raise UserError, before anything is trained, if checkpoint.export asks for a model that no Hugging Face family computes."""
    if cfg.checkpoint.export == "hf":
        from llmtrain.convert.families import pick_family

        pick_family(cfg.model)


def export(s, engine: Engine) -> Path | None:
    """The final weights as a Hugging Face folder `hf/` in the run folder, if checkpoint.export asks for it. Called by all ranks.

    Of a run that trains adapters these alone, as PEFT stores them, or the model with them added (lora.merge).
    """
    if s.cfg.checkpoint.export == "none":
        return None
    from llmtrain.convert.export import export_hf
    from llmtrain.convert.peft import export_peft
    from llmtrain.data.tokenizer import load

    model, lora = s.cfg.model, s.cfg.lora
    apart = lora.rank > 0 and not lora.merge
    target, weights = s.folder.path / "hf", full_weights(engine, s.mesh, adapters_only=apart)
    try:
        if s.mesh.rank == 0:
            tokenizer = load(s.cfg.tokenizer.path, s.cfg.tokenizer.kind) if s.cfg.tokenizer.path else None
            if apart:
                export_peft(target, model, lora, weights, tokenizer=tokenizer)
            else:
                whole = merged(weights, set(adapted(lora, model)), lora.scale) if lora.rank else weights
                export_hf(target, model, whole, tokenizer=tokenizer, rope_base=StepPlan.from_config(s.cfg).phases[-1].rope_base)
    finally:
        for _ in weights:  # the other ranks gather with this one, even if it could not write
            pass
    return target


def passage(s, engine: Engine) -> str | None:
    """metrics.sample completed by the trained model. Called by all ranks, which draw the same tokens from the same seed."""
    cfg = s.cfg
    if cfg.metrics.sample is None or cfg.tokenizer.path is None:
        return None
    from llmtrain.data.tokenizer import load
    from llmtrain.model.decode import UncachedRunner, generate
    from llmtrain.model.sampling import Sampling

    tokenizer = load(cfg.tokenizer.path, cfg.tokenizer.kind)
    prompt = tokenizer.encode(cfg.metrics.sample)
    rule = Sampling(max_new=cfg.metrics.sample_tokens, top_p=0.95, seed=cfg.seed, stop_ids=(tokenizer.eod_id,))
    runner = UncachedRunner(engine.logits, slots=1, capacity=len(prompt) + rule.max_new, window=cfg.train.seq_len)
    return tokenizer.decode(generate(runner, [prompt], rule)[0].tokens)


def baseline(cfg: RunConfig) -> float | None:
    """Loss (nats/token) of an interpolated bigram model of the training tokens on the validation tokens that the run is judged by.

    None unless metrics.bigram_baseline asks for it.
    """
    if not cfg.metrics.bigram_baseline or not cfg.data.validation:
        return None
    from llmtrain.data.bigram import bigram_baseline

    judged = cfg.train.validate_samples * cfg.train.seq_len
    mask = cfg.data.document_mask
    return bigram_baseline(cfg.data.train, cfg.data.validation[0], vocab_size=cfg.model.vocab_size, document_mask=mask, inputs=judged)
