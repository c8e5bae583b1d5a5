"""How DeepSpeed's optimizers lay out what a rank holds, stage by stage. The one place that reaches inside them.

DeepSpeed clips, updates and drops gradients in one call, `step()`, and skips a step by itself alone. Read here is what that leaves out: the
gradients after the backward passes, where fp32 weights and moments lie, and how a step is given up. Held to DeepSpeed 0.19.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter: those that this rank updates."""

    owner: Tensor
    """The tensor that the optimizer updates, and keeps moments of."""
    start: int
    """Their first place in the flat owner."""
    at: int
    """Their first place in the flat parameter."""
    count: int
    """How many there are; none for a parameter that other ranks update."""

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor of the owner's shape, as a flat view."""
        return tensor.detach().view(-1)[self.start : self.start + self.count]


class Replicated:
    """ZeRO 0: every rank updates every parameter, and DeepSpeed sums gradients alone."""

    holders: int | None = None
    """Ranks that update the same elements; None for all."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter]):
        self.engine, self.optimizer, self.parameters = engine, engine.optimizer, parameters
        self.pieces = {name: self._piece(parameter) for name, parameter in parameters.items()}

    def _piece(self, parameter: nn.Parameter) -> Piece:
        return Piece(parameter, 0, 0, parameter.numel())

    def owners(self) -> Sequence[Tensor]:
        """What the optimizer updates on this rank."""
        return list(self.parameters.values())

    def gradients(self) -> list[Tensor]:
        """This rank's part of the summed gradients, after the last backward pass of a step."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def parts(self) -> Iterator[list[Tensor]]:
        """The gradients, as many at a time as are in memory together."""
        yield self.gradients()

    def groups(self) -> list[tuple[int, list[str]]]:
        """(owner, parameters) by what is in memory together, in the same order on every rank."""
        return [(0, list(self.pieces))]

    @contextmanager
    def held(self, owner: int, *, changed: bool = False) -> Iterator[None]:
        """While an owner, its moments and its gradient are in memory. changed: the owner and its moments are written to meanwhile."""
        yield

    def step(self, divisor: float) -> None:
        """Let the optimizer update with the gradients over `divisor`."""
        if divisor != 1.0:
            for gradient in self.gradients():
                gradient.mul_(1.0 / divisor)
        self.engine.step()

    def drop(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def refresh(self) -> None:
        """Bring the parameters that compute up to the owners, which were written to."""


class Mapped(Replicated):
    """Where the owners are flat partitions of groups of parameters, and DeepSpeed says which part of a parameter lies in one."""

    holders = 1
    flat: str
    """The attribute that lists the owners."""

    def owners(self) -> Sequence[Tensor]:
        return getattr(self.optimizer, self.flat)

    def _piece(self, parameter: nn.Parameter) -> Piece:
        mapping = parameter._hp_mapping
        if mapping is None:
            return Piece(self.owners()[0], 0, 0, 0)
        inside, mine = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Piece(self.owners()[mapping.param_group_index], int(inside.start), int(mine.start), int(inside.numel))

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class Divided(Mapped):
    """An optimizer that divides gradients by a loss scale, which serves to clip as well: the scale is 1 in backward passes."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter]):
        super().__init__(engine, parameters)
        self.optimizer.override_loss_scale(1.0)

    def step(self, divisor: float) -> None:
        self.optimizer.override_loss_scale(divisor)
        self.engine.step()
        self.optimizer.override_loss_scale(1.0)


class Zero12(Divided):
    """ZeRO 1 and 2."""

    flat = "single_partition_of_fp32_groups"

    def gradients(self) -> list[Tensor]:
        if self.optimizer.cpu_offload:
            return [flat.grad for flat in self.owners()]
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group or ()]

    def drop(self) -> None:
        zero = self.optimizer
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))
        zero.all_grad_tensors.update(dict.fromkeys(zero.all_grad_tensors))
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()


class Bf16Zero1(Mapped):
    """ZeRO 1 in bf16 with gradients in fp32, for which DeepSpeed has an optimizer of its own."""

    flat = "fp32_groups_flat_partition"

    def gradients(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_gradient_flat_partition

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class Zero3(Divided):
    """ZeRO 3: each rank has an equal part of every parameter, the last one's padded. Owners may be in files, and are empty then."""

    flat = "fp32_partitioned_groups_flat"

    def _piece(self, parameter: nn.Parameter) -> Piece:
        zero = self.optimizer
        group, start, size = zero.grad_position[zero.get_param_id(parameter)]
        at = size * torch.distributed.get_rank()
        return Piece(self.owners()[group], start, at, max(0, min(size, parameter.ds_numel - at)))

    def gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return [flat.grad for flat in self.owners()]
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group or ()]

    def parts(self) -> Iterator[list[Tensor]]:
        if not self.optimizer.swap_optimizer:
            yield from super().parts()
            return
        for number, owner in enumerate(self.owners()):
            with self.held(number):
                yield [owner.grad]

    def groups(self) -> list[tuple[int, list[str]]]:
        if not self.optimizer.swap_optimizer:
            return super().groups()
        numbers = {id(owner): number for number, owner in enumerate(self.owners())}
        names: dict[int, list[str]] = {number: [] for number in numbers.values()}
        for name, piece in self.pieces.items():
            names[numbers[id(piece.owner)]].append(name)
        return list(names.items())

    @contextmanager
    def held(self, owner: int, *, changed: bool = False) -> Iterator[None]:
        zero = self.optimizer
        swapped = zero._swappable_optimizer_subgroup(owner)  # small groups stay in memory
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(owner)
        yield
        if swapped:
            zero._writeback_swap_state(owner, write_opt_state=changed, write_gradients=False)

    def drop(self) -> None:
        zero = self.optimizer
        zero._pre_step()
        zero._partition_all_parameters()
        zero._overflow_clean_up(1.0)
        if zero.swap_optimizer:
            zero.optimizer_swapper.flush_gradients()
            for swapped in zero.optimizer_swapper.swap_params_info.values():
                swapped.release_unswapped_gradients()
                swapped.swapped_gradients.clear()

    def refresh(self) -> None:
        zero = self.optimizer
        zero._partition_all_parameters()
        for number in range(len(self.owners())):
            with self.held(number):
                zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def layout_of(engine: Any, parameters: dict[str, nn.Parameter]) -> Replicated:
    """How the optimizer of a DeepSpeedEngine lays out `parameters`. Raises RuntimeError for one that is not known here."""
    kinds = {
        "DeepSpeedZeroOptimizer": Zero12,
        "BF16_Optimizer": Bf16Zero1,
        "DeepSpeedZeroOptimizer_Stage3": Zero3,
    }
    if engine.optimizer is engine.basic_optimizer:
        return Replicated(engine, parameters)
    name = type(engine.optimizer).__name__
    if name not in kinds:
        raise RuntimeError(f"DeepSpeed made a {name} of engine.options, which engine deepspeed does not know: take out what asks for it")
    return kinds[name](engine, parameters)
