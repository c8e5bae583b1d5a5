"""What a backward pass can do without: tensors that are computed again, or wait elsewhere, instead of being kept.

A tensor that can be had back is marked when it is made. Whatever saves it, or a view of it, for the backward pass while its block runs
saves an `Away` in its place (torch's saved-tensor hooks), so that its memory is free as soon as the forward pass is done with it. Graphs
stay as they are: gradients are those of a run that keeps everything, and a backward pass in halves works as ever.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llmtrain.compat import memory_of, operator_mode, swapped_parameters
from llmtrain.parallel.blocks import all_blocks
from llmtrain.parallel.fsdp import local_tensor


class Away(ABC):
    """A tensor that is not kept between forward and backward pass."""

    def __init__(self) -> None:
        self._saved = self._due = 0
        self._back: Tensor | None = None

    def save(self, tensor: Tensor) -> None:
        """One more operation saves `tensor`, which is this one or a view of it and still there."""
        self._saved += 1

    def ticket(self, tensor: Tensor) -> "Ticket":
        """What an operation saves in the place of `tensor`."""
        self.save(tensor)
        return Ticket(self, tensor.size(), tensor.stride(), tensor.storage_offset())

    def take(self) -> Tensor:
        """The tensor, for one operation; once it is back it stays until as many have taken it as have saved it."""
        if self._back is None:
            self.restore()
        tensor = self._back
        self._due -= 1
        if self._due <= 0:
            self._back = None
        return tensor

    def put(self, tensor: Tensor) -> None:
        """The tensor is back, if anybody has saved it."""
        if self._saved and self._back is None:
            self._back, self._due = tensor.detach(), self._saved

    @abstractmethod
    def restore(self) -> None:
        """Get it back, and `put` it."""


class Ticket(NamedTuple):
    """What an operation saves in the place of a tensor: where to get the memory, and how the tensor lies in it."""

    away: Away
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def unpack(saved: Tensor | Ticket) -> Tensor:
    """The tensor that was saved."""
    return saved if isinstance(saved, Tensor) else saved.away.take().as_strided(saved.size, saved.stride, saved.offset)


class Saving:
    """What the blocks of one model save: `run` goes around the forward pass of each, and marks hold until its end."""

    def __init__(self) -> None:
        self._marks: dict[Any, Away] = {}
        self._running = False
        self.entering: list[Callable[[nn.Module, Tensor], None]] = []
        """Called with a block and its input when its forward pass begins."""

    @classmethod
    def of(cls, model: nn.Module) -> "Saving":
        """That of `model`, whose blocks are wrapped on the first call. Parameter names do not change."""
        found = getattr(model, "saving", None)
        if found is None:
            model.saving = found = cls()
            for block in all_blocks(model):
                block.forward = partial(found.run, block, block.forward)
        return found

    @property
    def on(self) -> bool:
        """Whether a block runs that will have a backward pass."""
        return self._running and torch.is_grad_enabled()

    def run(self, block: nn.Module, forward: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
        """The forward pass of a block."""
        if not torch.is_grad_enabled():
            return forward(x, **options)
        self._running = True
        try:
            with saved_tensors_hooks(self.pack, unpack):
                for entering in self.entering:
                    entering(block, x)
                return forward(x, **options)
        finally:
            self._running = False
            self._marks.clear()

    def mark(self, tensor: Tensor, away: Away) -> None:
        """`tensor` need not be kept: `away` gives it back."""
        self._marks[memory_of(tensor)] = away

    def marked(self, tensor: Tensor) -> bool:
        """Whether this memory is marked."""
        return memory_of(tensor) in self._marks

    def pack(self, tensor: Tensor) -> Tensor | Ticket:
        """What to save in the place of `tensor`."""
        away = self._marks.get(memory_of(tensor))
        if away is None:
            return tensor.detach()  # an operation that saves its own result would hold itself
        return away.ticket(tensor)

    def again(
        self, call: Callable[..., Any], *given: Tensor, module: nn.Module | None = None, keeping: Container[str] = ()
    ) -> Tensor | tuple[Tensor, ...]:
        """`call(*given)`, a tensor or a tuple of them, of which nothing is kept but `given`: the backward pass calls it again.

        `module` has the parameters that the call uses: it finds them again as they are now. What the operators named in `keeping` give is
        kept, and they do not run again.
        """
        return Repeated(self, call, given, module=module, keeping=keeping).run() if self.on else call(*given)


class Again(Away):
    """A result of a call that is repeated, or something that it saved on its way."""

    def __init__(self, source: "Repeated") -> None:
        super().__init__()
        self._source = source

    def save(self, tensor: Tensor) -> None:
        super().save(tensor)
        self._source.keep()

    def restore(self) -> None:
        self._source.repeat()


class Repeated:
    """One call that the backward pass repeats, once for all that it gave and saved.

    The repetition computes with the same parameters, of which FSDP2 gathers the memory anew and `parallel/cast.py` makes copies that the
    module has no more by then.
    """

    def __init__(
        self,
        saving: Saving,
        call: Callable[..., Any],
        given: tuple[Tensor, ...],
        *,
        module: nn.Module | None = None,
        keeping: Container[str] = (),
    ) -> None:
        self.saving, self.call, self.module = saving, call, module
        self._outputs = Outputs(keeping) if keeping else None
        self._given: tuple[Tensor, ...] | None = given
        self._kept: list[Tensor | Ticket] | None = None
        self._differentiable = [tensor.requires_grad for tensor in given]
        self._parameters = {} if module is None else dict(module.named_parameters())
        # They hold on to this, and live as long as somebody has saved them.
        self._inner: list[weakref.ref[Again]] = []
        self._results: list[weakref.ref[Again]] = []

    def run(self) -> Any:
        """The call for the first time."""
        own = self._own(self._given)

        def pack(tensor: Tensor) -> Tensor | Ticket:
            if not own(tensor):
                return self.saving.pack(tensor)
            away = Again(self)
            self._inner.append(weakref.ref(away))
            return away.ticket(tensor)

        with saved_tensors_hooks(pack, unpack), self._outputs or nullcontext():
            results = self.call(*self._given)
        self.mark(*_tuple(results))
        return results

    def mark(self, *results: Tensor) -> None:
        """These are what the call gives: they are not kept."""
        for result in results:
            away = Again(self)
            self._results.append(weakref.ref(away))
            self.saving.mark(result, away)

    def keep(self) -> None:
        """Something of it has been saved, so what it was given is needed."""
        if self._kept is None:
            self._kept, self._given = [self.saving.pack(tensor.detach()) for tensor in self._given], None

    @torch.no_grad()
    def repeat(self) -> None:
        """The call once more; puts back what was saved of it."""
        given = [unpack(kept).detach().requires_grad_(needed) for kept, needed in zip(self._kept, self._differentiable)]
        own, inner = self._own(given), []

        def pack(tensor: Tensor) -> Tensor:
            if own(tensor):
                inner.append(tensor.detach())
            return tensor.detach()

        graph = torch.set_grad_enabled(bool(self._inner))  # only what saves something on its way has to build one again
        with self._with_parameters(), graph, saved_tensors_hooks(pack, unpack), self._outputs or nullcontext():
            results = _tuple(self.call(*given))
        for reference, tensor in zip([*self._inner, *self._results], [*inner, *results], strict=True):
            if (away := reference()) is not None:
                away.put(tensor)

    def _own(self, given: Any) -> Callable[[Tensor], bool]:
        """Whether a tensor that the call saves is its own and worth repeating the call for: not given, no parameter, and not small, as
        the factors of a norm are."""
        others = {memory_of(tensor) for tensor in (*given, *map(local_tensor, self._parameters.values()))}
        small = given[0].numel() // 4
        return lambda tensor: tensor.numel() > small and memory_of(tensor) not in others

    def _with_parameters(self) -> Any:
        if self.module is None:
            return nullcontext()
        now = dict(self.module.named_parameters())
        return swapped_parameters(self.module, {name: tensor for name, tensor in self._parameters.items() if now[name] is not tensor})


class Outputs(operator_mode()):
    """Keeps what the operators of these names give when a call runs for the first time, and gives it whenever the call runs again."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self._names, self._kept = names, []
        self._again: Iterator[Any] | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._again = iter(self._kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.name() not in self._names:
            return func(*args, **(kwargs or {}))
        if self._again is not None:
            return _detached(next(self._again))
        results = func(*args, **(kwargs or {}))
        self._kept.append(_detached(results))
        return results


def _detached(results: Any) -> Any:
    if isinstance(results, tuple | list):
        return tuple(map(_detached, results))
    return results.detach() if isinstance(results, Tensor) else results


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results
