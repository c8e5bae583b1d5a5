"""One short training run on this world's ranks, as numbers to compare."""

import numpy as np
import torch

from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.device import Device
from llmtrain.engine.base import ENGINES, Engine
from llmtrain.engine.native import build as _register_native  # noqa: F401
from llmtrain.layout.steps import StepPlan
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import implementations, op_names, resolve
from llmtrain.parallel import mesh as world
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.stages.session import op_call
from llmtrain.train.stream import micro_batches


class Documents:
    """Samples of packed documents of random lengths; the later a sample, the more of its targets are masked away, so ranks differ."""

    def __init__(self, *, seq_len: int, vocab_size: int, batch: int, permute: bool):
        self.seq_len, self.vocab_size, self.batch_size, self.permute = seq_len, vocab_size, batch, permute

    def batch(self, first: int, count: int) -> Batch:
        """`count` samples from number `first` on."""
        rows = [self._row(self._place(sample)) for sample in range(first, first + count)]
        tokens, targets, positions, documents = zip(*rows)
        stack = [torch.from_numpy(np.stack(part)) for part in (tokens, targets, positions)]
        return Batch(*stack, documents=documents, samples=tuple(range(first, first + count)))

    def _place(self, sample: int) -> int:
        """The samples of a step in reverse, if asked: sums are then made in another order."""
        start = sample // self.batch_size * self.batch_size
        return 2 * start + self.batch_size - 1 - sample if self.permute else sample

    def _row(self, sample: int):
        rng = np.random.default_rng(sample)
        cuts = np.unique(rng.integers(1, self.seq_len, size=rng.integers(0, 5)))
        lengths = np.diff([0, *cuts, self.seq_len])
        tokens = rng.integers(0, self.vocab_size, size=self.seq_len + 1)
        targets = tokens[1:].copy()
        targets[np.cumsum(lengths) - 1] = NO_TARGET
        targets[: sample % 8 * self.seq_len // 16] = NO_TARGET
        return tokens[:-1], targets, np.concatenate([np.arange(n) for n in lengths]), tuple(int(n) for n in lengths)


def parity(
    *, device: Device, settings: dict, plain: bool = False, permute: bool = False, nudge: int | None = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Losses of every step, and the gradients of step 1 by name from all ranks.

    plain: the reference of every op. permute: the samples of each step in another order. nudge: seed by which every initial weight is
    moved to a neighbouring number (one process alone).
    """
    cfg = RunConfig.model_validate(settings | {"kernels": plain_kernels() if plain else {}})
    engine = build_engine(cfg, device)
    if nudge is not None:
        nudge_weights(engine, nudge)
    plan, mesh = StepPlan.from_config(cfg), engine.mesh
    data = Documents(seq_len=cfg.train.seq_len, vocab_size=cfg.model.vocab_size, batch=cfg.train.global_batch, permute=permute)
    losses, gradients = [], {}
    for index in range(plan.steps):
        step = plan.step(index)
        batches = micro_batches(step, data, rank=mesh.data_rank, ranks=mesh.shape.dp)
        losses.append(engine.forward_backward(batches).loss)
        if index == 0:
            gradients = _gradients(engine)
        engine.grad_norm()
        engine.apply(lr=step.lr)
    mesh.leave()
    return {"losses": losses}, gradients


def build_engine(cfg: RunConfig, device: Device) -> Engine:
    """The engine of `cfg` on this world's ranks, which may have had other meshes before."""
    mesh = world.start(cfg.parallel, device=device)
    ops = resolve(cfg.kernels, op_call(cfg, device))
    return ENGINES[cfg.engine.kind](cfg, objective=cross_entropy, mesh=mesh, device=device, ops=ops)


def plain_kernels() -> dict[str, str]:
    """The reference of every op: the implementation whose speed is 0."""
    return {op: entry.name for op in op_names() for entry in implementations(op) if entry.speed == 0}


def _gradients(engine: Engine) -> dict[str, np.ndarray]:
    mine = {name: _whole(parameter.grad).double().cpu().numpy() for name, parameter in engine.parameters.items()}
    return {name: gradient for part in engine.mesh.gather(mine) for name, gradient in part.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else local_tensor(tensor)
    return tensor.detach().cpu()


def nudge_weights(engine: Engine, seed: int) -> None:
    """Move every weight to one of the two numbers next to it: as little as a number can differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.parameters.values():
            ends = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, torch.inf, -torch.inf)
            parameter.copy_(torch.nextafter(parameter, ends))
