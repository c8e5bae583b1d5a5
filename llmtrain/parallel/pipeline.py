"""Carries out the action lists of `layout/schedule.py`: the stages of a pipeline, micro-batch by micro-batch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmtrain.compat import is_view, reduce_fsdp_gradients, split_backward
from llmtrain.layout.schedule import Action, Schedule, with_communication
from llmtrain.parallel.hang.record import BACKWARD, FORWARD
from llmtrain.parallel.hang.where import Begun, at, ends, mark, recorded
from llmtrain.parallel.turns import together

Forward = Callable[[int, int, Tensor | None], Tensor]
"""(stage, micro-batch, hidden states from the stage before or None) -> hidden states, or the last stage's scalar to minimise."""
AT_FIRST = ("F", "RECV_F", "SEND_B")
"""Actions at the first layer of a stage; the others begin at its last one."""
ONWARD = ("F", "RECV_F", "SEND_F")
"""Actions of forward passes."""


class _Kept(NamedTuple):
    """What a forward pass leaves for its backward pass."""

    entered: Tensor | None
    left: Tensor


class Pipeline:
    """The stages that this rank holds, and the ranks that hold the others.

    Each stage is an FSDP root of its own, or plain. Gradients of a stage are reduced over data-parallel ranks once, when its last
    backward pass of the step is done. With `overlap` the pairs of a schedule run in turns, the backward pass in a thread that
    `enter_thread` is called in first.
    """

    def __init__(
        self,
        parts: dict[int, nn.Module],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        overlap: bool = False,
        enter_thread: Callable[[], None] | None = None,
    ):
        self.parts, self.group, self.device, self.overlap, self.enter_thread = parts, group, device, overlap, enter_thread
        self.ends = {stage: ends(part) for stage, part in parts.items()}

    def run(
        self, schedule: Schedule, forward: Forward, *, shape: Callable[[int], Sequence[int]], dtype: torch.dtype, backward: bool = True
    ) -> dict[int, Tensor]:
        """Carry out this rank's part of `schedule`; returns what the last stage gave, by micro-batch: {} on ranks without it.

        `shape(m)` is the shape of hidden states of micro-batch m between stages, `dtype` their format. Without `backward`, for a
        schedule of forwards alone, nothing is kept for a backward pass.
        """
        run = _Run(self, schedule, forward, shape=shape, dtype=dtype, backward=backward)
        for part in self.parts.values() if backward else ():
            if isinstance(part, FSDPModule):
                part.set_is_last_backward(False)
                part.set_reshard_after_backward(False)
                part.set_requires_gradient_sync(False)
        for action in with_communication(schedule)[dist.get_rank(self.group)]:
            run.do(action)
        run.finish()
        for part in self.parts.values() if backward else ():
            if isinstance(part, FSDPModule):
                reduce_fsdp_gradients(part)
        return run.results


class _Run:
    """One pass over a schedule."""

    def __init__(self, pipeline: Pipeline, schedule: Schedule, forward: Forward, *, shape: Callable, dtype: torch.dtype, backward: bool):
        self.pipeline, self.schedule, self.forward = pipeline, schedule, forward
        self.shape, self.dtype, self.backward = shape, dtype, backward
        self.results: dict[int, Tensor] = {}
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._weights: dict[tuple[int, int], Callable[[], None]] = {}
        self._arriving: dict[tuple[str, int, int], tuple[Tensor, Begun]] = {}
        self._ready: dict[tuple[str, int, int], Tensor] = {}
        self._sent: list[tuple[Tensor, Begun]] = []
        self._beside = ThreadPoolExecutor(1, initializer=pipeline.enter_thread)

    def do(self, action: Action) -> None:
        """Carry out one action. The parts of a pair are done one after the other if not asked for otherwise, or both of one stage: FSDP2
        keeps one state of where a stage is."""
        parts = action.flat()
        if self.pipeline.overlap and len({part.stage for part in parts}) > 1:
            forward, backward = (partial(self._part, part) for part in parts)
            together(backward, forward, beside=self._beside)
        else:
            for part in parts:
                self._part(part)

    def _part(self, part: Action) -> None:
        key = part.stage, part.micro_batch
        at(micro_batch=part.micro_batch)
        mark(self.pipeline.ends[part.stage][part.kind not in AT_FIRST], FORWARD if part.kind in ONWARD else BACKWARD)
        match part.kind:
            case "F":
                self._forward(*key)
            case "B":
                self._backward(*key)
            case "I":
                self._backward_inputs(*key)
            case "W":
                self._backward_weights(*key)
            case "SEND_F":
                self._send(self._ready.pop(("F", part.stage + 1, part.micro_batch)), part.stage + 1)
            case "RECV_F":
                self._receive("F", *key, source=part.stage - 1)
            case "SEND_B":
                self._send(self._ready.pop(("B", part.stage - 1, part.micro_batch)), part.stage - 1)
            case "RECV_B":
                self._receive("B", *key, source=part.stage + 1)

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        self._beside.shutdown()
        for _, begun in self._sent:
            begun.wait()

    # --- computing ----------------------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, micro: int) -> None:
        entered = None if stage == 0 else self._take("F", stage, micro)
        if entered is not None and self.backward:
            entered.requires_grad_()
        left = self.forward(stage, micro, entered)
        if stage == self.schedule.stages - 1:
            self.results[micro] = left.detach()
        else:
            self._ready["F", stage + 1, micro] = left.detach()
        if self.backward:
            self._kept[stage, micro] = _Kept(entered, left)

    def _slope(self, stage: int, micro: int) -> Tensor | None:
        return None if stage == self.schedule.stages - 1 else self._take("B", stage, micro)

    def _backward(self, stage: int, micro: int) -> None:
        kept, slope = self._kept.pop((stage, micro)), self._slope(stage, micro)
        torch.autograd.backward(kept.left, slope)
        self._hand_back(stage, micro, kept)

    def _backward_inputs(self, stage: int, micro: int) -> None:
        kept, slope = self._kept.pop((stage, micro)), self._slope(stage, micro)
        if kept.entered is None:  # the first stage has no inputs to differentiate: all of it waits for W
            self._weights[stage, micro] = partial(torch.autograd.backward, kept.left, slope)
            return
        halves = split_backward()
        if halves is None:  # both halves now, and nothing is left for W
            torch.autograd.backward(kept.left, slope)
            self._weights[stage, micro] = lambda: None
        else:
            slopes = None if slope is None else [slope]
            left = kept.left.clone() if is_view(kept.left) else kept.left  # torch detaches it in place, which views do not allow
            _, groups = halves[0]([left], slopes, [kept.entered], self._trained(stage))
            self._weights[stage, micro] = partial(self._backward_groups, stage, groups, halves[1])
        self._hand_back(stage, micro, kept)

    def _backward_weights(self, stage: int, micro: int) -> None:
        self._weights.pop((stage, micro))()

    def _backward_groups(self, stage: int, groups: list[dict[str, Any]], for_weights: Callable) -> None:
        """Gradients of the weights that the half for the inputs has left."""
        # A parameter that is used several times, as a norm by heads that look ahead, is reached through what lies between its uses, which
        # other parameters need again.
        again = any(len(group["intermediates"]) > 1 for group in groups)
        for_weights(self._trained(stage), groups, retain_graph=again)

    def _trained(self, stage: int) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.pipeline.parts[stage].parameters() if parameter.requires_grad)

    def _hand_back(self, stage: int, micro: int, kept: _Kept) -> None:
        if kept.entered is not None:
            self._ready["B", stage - 1, micro] = kept.entered.grad
            kept.entered.grad = None

    # --- moving -------------------------------------------------------------------------------------------------------------------

    def _take(self, kind: str, stage: int, micro: int) -> Tensor:
        """What `stage` needs for a pass of `kind`: from another rank, or left here by a stage of this one."""
        arriving = self._arriving.pop((kind, stage, micro), None)
        if arriving is None:
            return self._ready.pop((kind, stage, micro))
        tensor, begun = arriving
        begun.wait()
        return tensor

    def _receive(self, kind: str, stage: int, micro: int, *, source: int) -> None:
        tensor = torch.empty(tuple(self.shape(micro)), dtype=self.dtype, device=self.pipeline.device)
        self._arriving[kind, stage, micro] = tensor, self._transfer("recv", dist.irecv, tensor, source)

    def _send(self, tensor: Tensor, stage: int) -> None:
        tensor = tensor.contiguous()
        self._sent.append((tensor, self._transfer("send", dist.isend, tensor, stage)))
        self._sent = [sent for sent in self._sent if not sent[1].is_completed()]

    def _transfer(self, name: str, op: Callable, tensor: Tensor, stage: int) -> Begun:
        group, peer = self.pipeline.group, self.schedule.stage_rank(stage)
        begun = Begun(name, group, peer=dist.get_global_rank(group, peer))
        return begun.by(*dist.batch_isend_irecv([dist.P2POp(op, tensor, group=group, group_peer=peer)]))


def from_stage(
    result: Tensor | None, shape: Sequence[int], dtype: torch.dtype, *, group: dist.ProcessGroup, source: int, device: torch.device
) -> Tensor:
    """What rank `source` of `group` has as `result`, of this shape, on all its ranks."""
    result = torch.empty(tuple(shape), dtype=dtype, device=device) if result is None else result.to(dtype).contiguous()
    if result.numel():
        with recorded("broadcast", group):
            dist.broadcast(result, group=group, group_src=source)
    return result
