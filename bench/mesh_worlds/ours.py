"""The engine of a session, as the stages build it, with its hang watcher and records."""

from contextlib import ExitStack

import torch
from torch import Tensor
from train_peers import shape as s

from mesh_worlds.cases import Case


def config(case: Case, shape: s.Shape):
    """The run configuration."""
    from llmtrain.config.load import load

    dp = case.axes.get("dp_shard", 1)
    given = {
        "device": "cpu",
        "model": {
            "vocab_size": shape.vocab,
            "layers": shape.layers,
            "hidden": shape.dim,
            "attention": {"heads": shape.heads},
            "ffn": {"hidden": shape.ffn},
            "max_seq_len": shape.seq,
            "norm": {"eps": 1e-5},
            "position": {"base": 10_000.0},
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
        "train": {
            "seq_len": shape.seq,
            "global_batch": shape.batch,
            "micro_batch": shape.batch // dp // case.micro_batches,
            "compile": "off",
            "loss_chunk": shape.tokens,
        },
        "parallel": case.options(shape),
    }
    return load(given, []).run


class Trainer:
    """A step is what the training loop does: forward, backward, norm, clip, AdamW."""

    def __init__(self, case: Case, shape: s.Shape):
        from llmtrain.data.batch import Batch
        from llmtrain.model.objective import cross_entropy
        from llmtrain.stages.session import session

        self.world, self.case, self.batch = ExitStack(), case, Batch
        started = self.world.enter_context(session(config(case, shape)))
        self.mesh, self.engine = started.mesh, started.build_engine(cross_entropy)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on tokens and targets [B,S], of which this rank takes its rows; returns the mean loss."""
        tokens, targets = (x.chunk(self.mesh.shape.dp)[self.mesh.data_rank] for x in (tokens, targets))
        rows, length = tokens.shape
        positions = torch.arange(length).expand(rows, -1)
        micro = rows // self.case.micro_batches
        parts = zip(tokens.split(micro), targets.split(micro), positions.split(micro))
        made = [self.batch(*part, documents=None, samples=tuple(range(len(part[0])))) for part in parts]
        result = self.engine.forward_backward(made)
        self.engine.grad_norm()
        self.engine.apply(lr=s.LR)
        return result.loss

    def close(self) -> None:
        """Leave the session."""
        self.world.close()
