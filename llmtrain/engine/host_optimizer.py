"""An optimizer whose moments stay in the host's memory, and come to the device slice by slice during a step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.config.sparing import MOMENT_SLICES
from llmtrain.config.train import OptimConfig
from llmtrain.device.host_copies import Copy, HostCopies
from llmtrain.engine.local_optimizer import is_decayed
from llmtrain.ops import Ops
from llmtrain.parallel.fsdp import local_tensor

UNIT = 64
"""Slices begin at multiples of so many elements, so that vectorised kernels treat every element as they would in the whole."""


@dataclass
class Piece:
    """Elements `start` to `stop` of this rank's part of a parameter; all of it if they are not consecutive in memory."""

    name: str
    start: int
    stop: int
    mine: nn.Parameter
    """What AdamW updates: memory of the parameter, set in every step."""

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor of the parameter's shape."""
        return tensor if self.stop - self.start == tensor.numel() else tensor.reshape(-1)[self.start : self.stop]


class HostOptimizer:
    """LocalOptimizer with its moments on the host: the same numbers bit for bit, for three sixteenths of the device's memory.

    `moments[name]` are this rank's (exp_avg, exp_avg_sq) on the host.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], cfg: OptimConfig, *, ops: Ops, copies: HostCopies):
        self.parameters, self._copies = parameters, copies
        local = {name: local_tensor(parameter).detach() for name, parameter in parameters.items()}
        self._moments = {name: tuple(copies.host_memory(tensor).zero_() for _ in range(2)) for name, tensor in local.items()}
        self._slices = list(_cut(local))
        self._adamws = [_adamw(pieces, cfg, ops=ops) for pieces in self._slices]
        self._sent: list[Copy] = []

    @property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The moments by parameter name, once the last step's have arrived."""
        for copy in self._sent:
            copy.finish()
        self._sent = []
        return self._moments

    @torch.no_grad()
    def step(self, *, lr: float) -> None:
        """Update every parameter that has a gradient."""
        leaving: list[Copy] = []
        coming = self._bring(0)
        for index, adamw in enumerate(self._adamws):
            arrived, coming = coming, self._bring(index + 1)
            for group in adamw.param_groups:
                group["lr"] = lr
            for piece, copies in arrived:
                self._place(adamw, piece, [copy.wait() for copy in copies])
            adamw.step()
            _forget(leaving)  # of the slice before
            leaving = [copy for piece, _ in arrived for copy in self._send(adamw, piece)]
            self._sent += leaving
        _forget(leaving)

    def _bring(self, index: int) -> list[tuple[Piece, list[Copy]]]:
        """Begin to bring the moments of a slice's pieces that have a gradient; nothing for one past the last."""
        pieces = self._slices[index] if index < len(self._slices) else []
        mine = [piece for piece in pieces if self.parameters[piece.name].grad is not None]
        return [(piece, [self._copies.to_device(piece.of(moment)) for moment in self._moments[piece.name]]) for piece in mine]

    def _place(self, adamw: torch.optim.Optimizer, piece: Piece, moments: list[Tensor]) -> None:
        """Give AdamW a piece with its gradient and moments."""
        parameter = self.parameters[piece.name]
        # FSDP2 may give a parameter other memory when it first runs.
        piece.mine.data, piece.mine.grad = piece.of(local_tensor(parameter)), piece.of(local_tensor(parameter.grad))
        adamw.state[piece.mine].update(zip(("exp_avg", "exp_avg_sq"), moments))

    def _send(self, adamw: torch.optim.Optimizer, piece: Piece) -> list[Copy]:
        """Begin to send the moments of a piece back, and take them and the gradient from AdamW."""
        state, piece.mine.grad = adamw.state[piece.mine], None
        there = zip(("exp_avg", "exp_avg_sq"), self._moments[piece.name])
        return [self._copies.to_host(state.pop(kind), into=piece.of(moment)) for kind, moment in there]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def set_steps(self, steps: int) -> None:
        """The number of steps that the moments have seen."""
        for pieces, adamw in zip(self._slices, self._adamws):
            for piece in pieces:
                adamw.state[piece.mine]["step"].fill_(steps)


def _forget(leaving: list[Copy]) -> None:
    """Free the device's memory once the host has these."""
    for copy in leaving:
        copy.wait()


def _cut(local: dict[str, Tensor]) -> Iterator[list[Piece]]:
    """MOMENT_SLICES slices of about as many elements, or a few more, in the parameters' order."""
    room = size = -(-sum(tensor.numel() for tensor in local.values()) // (MOMENT_SLICES * UNIT)) * UNIT
    pieces: list[Piece] = []
    for name, tensor in local.items():
        start = 0
        while start < tensor.numel():
            rest = tensor.numel() - start
            count = rest if rest <= room or not tensor.is_contiguous() else room // UNIT * UNIT
            if count:
                pieces.append(Piece(name, start, start + count, nn.Parameter(tensor.reshape(-1)[start : start + count])))
            start, room = start + count, room - count
            if start < tensor.numel() or room <= 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _adamw(pieces: list[Piece], cfg: OptimConfig, *, ops: Ops) -> torch.optim.Optimizer:
    groups = [
        {"params": [piece.mine for piece in pieces if is_decayed(piece.name, cfg) is decay], "weight_decay": weight_decay}
        for decay, weight_decay in ((True, cfg.weight_decay), (False, 0.0))
    ]
    adamw = ops.adamw([group for group in groups if group["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    for piece in pieces:
        adamw.state[piece.mine] = {"step": torch.zeros((), dtype=torch.float32, device=piece.mine.device)}
    return adamw
