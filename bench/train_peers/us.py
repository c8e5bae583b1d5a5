"""llmtrain, by the engine that `llmtrain train` builds from the same configuration."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from train_peers import shape as s


@dataclass
class Ours:
    """A step is what the training loop does: forward, backward, norm, clip, AdamW."""

    engine: object
    batches: list
    world: ExitStack

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.engine.parameters.values())

    def step(self, index: int) -> float:
        """One optimizer step on batch `index`; returns its loss."""
        result = self.engine.forward_backward([self.batches[index % len(self.batches)]])
        self.engine.grad_norm()
        self.engine.apply(lr=s.LR)
        return result.loss

    def close(self) -> None:
        """Leave the session."""
        self.world.close()


def values(shape: s.Shape) -> dict:
    """The configuration that every run of `shape` has, as YAML would give it."""
    return {
        "device": "cpu",
        "model": {
            "vocab_size": shape.vocab,
            "layers": shape.layers,
            "hidden": shape.dim,
            "attention": {"heads": shape.heads},
            "ffn": {"hidden": shape.ffn},
            "max_seq_len": shape.seq,
        },
        "data": {"document_mask": False},
        "optim": {
            "lr": s.LR,
            "betas": list(s.BETAS),
            "eps": s.EPS,
            "weight_decay": s.WEIGHT_DECAY,
            "no_decay": [],
            "max_grad_norm": s.CLIP,
        },
        "train": {"seq_len": shape.seq, "global_batch": shape.batch, "micro_batch": shape.batch},
    }


def config(shape: s.Shape, *, dtype: str, compiled: bool, overrides: list[str]):
    """The run configuration of `shape`, with the words of a command line laid over it."""
    from llmtrain.config.load import load

    given = values(shape) | {"precision": dtype}
    given["train"]["compile"] = "on" if compiled else "off"
    return load(given, overrides).run


def build(shape: s.Shape, *, dtype: str, compiled: bool, overrides: list[str]) -> Ours:
    """The engine of a session, as the stages build it; its run folder is in the working directory."""
    from llmtrain.data.batch import Batch
    from llmtrain.model.objective import cross_entropy
    from llmtrain.stages.session import session

    cfg, world = config(shape, dtype=dtype, compiled=compiled, overrides=overrides), ExitStack()
    engine = world.enter_context(session(cfg)).build_engine(cross_entropy)
    positions = torch.arange(shape.seq).expand(shape.batch, -1).contiguous()
    samples = tuple(range(shape.batch))
    made = [
        Batch(tokens=tokens, targets=targets, positions=positions, documents=None, samples=samples) for tokens, targets in s.batches(shape)
    ]
    return Ours(engine, made, world)
