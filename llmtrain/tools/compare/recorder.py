"""Hooks that make a trace of a step: what modules and ops give, and the gradients at the same places."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.model.init import canonical_name
from llmtrain.ops import Ops
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.tools.compare.settings import LIMIT
from llmtrain.tools.compare.trace import BACKWARD, FORWARD, WEIGHTS, Point, make_point

OUTSIDE = ("attention", "cross_entropy")  # ops that torch.compile is never given


class Recorder:
    """Collects the points of one step in execution order.

    Ops are recorded because the model is built with `ops(...)` around its own; modules because hooks are attached to them for the step.
    `inner=False` stays outside of what torch.compile takes: embeddings, whole blocks, the attention op, final norm and head.
    """

    def __init__(self, *, limit: int = LIMIT, inner: bool = True):
        self.limit, self.inner = limit, inner
        self.points: list[Point] = []
        self.scale = 1.0
        """Loss scale by which gradients are multiplied while they are computed."""
        self._stack: list[str] = []  # modules that are running now; empty while gradients are computed, also where they recompute
        self._last: tuple[list[Tensor], list[Point]] = [], []  # what was noted last
        self._in_op = False
        self._names: Counter[tuple[str, str]] = Counter()

    def ops(self, ops: Ops) -> Ops:
        """The same ops, each noting what it gives."""
        recorded = {op: c for op, c in ops.choices.items() if self.inner or op in OUTSIDE}
        return Ops({**ops.choices, **{op: replace(c, function=self._noting(op, c.function)) for op, c in recorded.items()}})

    def weights(self, state: Mapping[str, Tensor]) -> None:
        """Note the weights in an engine's canonical state."""
        for key, tensor in state.items():
            if key.endswith(".weight"):
                self._add(key.removesuffix(".weight"), WEIGHTS, local_tensor(tensor))

    def number(self, name: str, phase: str, value: float) -> None:
        """Note a plain number that the engine reports."""
        self._add(name, phase, torch.tensor(value, dtype=torch.float64))

    @contextmanager
    def attached(self, models: list[nn.Module]) -> Iterator[None]:
        """Hooks on the modules and parameters of `models` while the context lasts."""
        handles = []
        for model in models:
            for name, module in model.named_modules():
                if self.inner or self._outside(name):
                    clean = canonical_name(f"{name}.")[:-1]
                    handles.append(module.register_forward_pre_hook(partial(self._enter, clean)))
                    handles.append(module.register_forward_hook(partial(self._leave, clean)))
            for name, parameter in model.named_parameters():
                handles.append(parameter.register_post_accumulate_grad_hook(partial(self._accumulated, canonical_name(name))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _outside(name: str) -> bool:
        parts = name.split(".")
        return len(parts) == 1 or (len(parts) == 2 and parts[0] == "blocks")

    def _enter(self, name: str, _module: nn.Module, _args: tuple) -> None:
        if self._stack or not name:  # a module outside of the model's forward pass recomputes
            self._stack.append(name)

    def _leave(self, name: str, _module: nn.Module, _args: tuple, out: Any) -> None:
        if not self._stack:
            return
        self._stack.pop()
        tensors, points = self._last
        if not name:
            self._last = [], []
        elif points and len(tensors) == len(_floating(out)) and all(map(operator.is_, tensors, _floating(out))):
            for point, called in zip(points, self._called(name, len(points))):
                point.name = called  # the module gives what its op gave: one point, by the module's name
        else:
            self._outputs(name, out)

    def _noting(self, op: str, function: Callable) -> Callable:
        @wraps(function)
        def noting(*args: Any, **kwargs: Any) -> Any:
            outermost, self._in_op = not self._in_op, True  # an op may be made of others, which are not there in every implementation
            try:
                out = function(*args, **kwargs)
            finally:
                self._in_op = not outermost
            if self._stack and outermost:
                out = _at_the_border(out)
                self._outputs(".".join(filter(None, [self._stack[-1], op])), out, op=op)
            return out

        return noting

    def _outputs(self, name: str, out: Any, op: str | None = None) -> None:
        """Note the floating tensors of `out`, and a router's choices."""
        floating = _floating(out)
        points = [self._add(called, FORWARD, t, op=op) for called, t in zip(self._called(name, len(floating)), floating)]
        for point, tensor in zip(points, floating):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, point))
        self._last = floating, points
        if op is None and floating:
            for tensor in _tensors(out):
                if not tensor.is_floating_point():
                    self._add(self._numbered(FORWARD, f"{name}.ids"), FORWARD, tensor)

    def _gradient(self, point: Point, gradient: Tensor) -> None:
        self._add(point.name, BACKWARD, gradient, op=point.op)

    def _accumulated(self, name: str, parameter: nn.Parameter) -> None:
        self._add(name, BACKWARD, local_tensor(parameter.grad))

    def _add(self, name: str, phase: str, tensor: Tensor, *, op: str | None = None) -> Point:
        point = make_point(name, phase, tensor, limit=self.limit, op=op, scale=self.scale if phase == BACKWARD else 1.0)
        self.points.append(point)
        return point

    def _called(self, name: str, count: int) -> list[str]:
        """Names of the `count` tensors that `name` has given now."""
        numbered = self._numbered(FORWARD, name)
        return [numbered if not place else f"{numbered}[{place}]" for place in range(count)]

    def _numbered(self, phase: str, name: str) -> str:
        """The second and later calls of a module or op within one step get a number."""
        self._names[phase, name] += 1
        count = self._names[phase, name]
        return name if count == 1 else f"{name}.{count}"


def _at_the_border(out: Any) -> Any:
    """Results of an op with several, as views: what arrives there is the gradient from outside of the op.

    One result may have been made from another inside (the norm of a sum), which a fused kernel's own graph does not show.
    """
    if type(out) is not tuple:
        return out
    return tuple(t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in out)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]


def _floating(out: Any) -> list[Tensor]:
    return [tensor for tensor in _tensors(out) if tensor.is_floating_point()]
