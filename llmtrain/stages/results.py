"""What a finished run leaves for people: a passage, exported weights, a baseline to compare with."""

from collections.abc import Iterator
from pathlib import Path

import torch

from llmtrain.config.run import RunConfig
from llmtrain.engine.base import Engine
from llmtrain.layout.steps import StepPlan


def full_weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, whole tensor on the CPU) one at a time; all ranks must go through it together."""
    for key, tensor in engine.state().items():
        name, _, kind = key.rpartition(".")
        if name and kind not in ("exp_avg", "exp_avg_sq"):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            yield name, whole.cpu()


def export(s, engine: Engine) -> Path | None:
    """The final weights as a Hugging Face folder `hf/` in the run folder, if checkpoint.export asks for it. Called by all ranks."""
    if s.cfg.checkpoint.export == "none":
        return None
    from llmtrain.convert.export import export_hf
    from llmtrain.data.tokenizer import load

    target, weights = s.folder.path / "hf", full_weights(engine)
    try:
        if s.mesh.rank == 0:
            tokenizer = load(s.cfg.tokenizer.path, s.cfg.tokenizer.kind) if s.cfg.tokenizer.path else None
            rope_base = StepPlan.from_config(s.cfg).phases[-1].rope_base
            export_hf(target, s.cfg.model, weights, tokenizer=tokenizer, rope_base=rope_base)
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
