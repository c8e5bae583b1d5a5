"""The engine of a session, as the stages build it, with its hang watcher and records."""

import importlib
from contextlib import ExitStack

import torch
from torch import Tensor
from train_peers import shape as s
from train_peers.us import values

from mesh_worlds.cases import Case


def config(case: Case, shape: s.Shape, engine: str = "native"):
    """The run configuration."""
    from llmtrain.config.load import load

    given = values(shape)
    given["model"] |= {"norm": {"eps": 1e-5}, "position": {"base": 10_000.0}}
    given["train"] |= {
        "micro_batch": shape.batch // case.axes.get("dp_shard", 1) // case.micro_batches,
        "compile": "off",
        "loss_chunk": shape.tokens,
    }
    return load(given | {"parallel": case.options(shape), "engine": engine}, []).run


class Trainer:
    """A step is what the training loop does: forward, backward, norm, clip, AdamW."""

    def __init__(self, case: Case, shape: s.Shape, *, engine: str = "native"):
        from llmtrain.data.batch import Batch
        from llmtrain.model.objective import cross_entropy
        from llmtrain.stages.session import session

        if engine == "megatron":
            importlib.import_module("megatron_cpu")  # of the tests: it answers for CUDA
        self.world, self.case, self.batch = ExitStack(), case, Batch
        started = self.world.enter_context(session(config(case, shape, engine)))
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
