"""Which experts every token of a step is sent to, whatever the mesh: tokens are told apart by a number that travels as they do."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmtrain.engine import native
from llmtrain.engine.stages import Stages
from llmtrain.model.moe import MoE


class Routing:
    """A context in which an engine's step is watched. Nothing is recorded for a model without experts.

    A batch whose token ids are (sample, position) numbers goes through the engine's own `prepare`, so cp and tp deal the numbers out
    as they do the tokens. A layer called outside of a stage's forward pass recomputes and is not looked at.
    """

    def __init__(self, engine):
        self.engine = engine
        parts = engine.stages.parts.values()
        self.names = {module: name for part in parts for name, module in part.named_modules() if isinstance(module, MoE)}
        self.chosen: dict[str, dict[int, tuple[int, ...]]] = {}
        self._numbers: Tensor | None = None

    def __enter__(self) -> "Routing":
        self._before = native.prepare, Stages._call, {layer: layer.observe for layer in self.names}
        prepare, call, observe = self._before

        def prepared(batch, **options):
            micro = prepare(batch, **options)
            first = torch.tensor(batch.samples)[:, None] * batch.tokens.shape[1] + 1  # 0 is padding
            numbered = replace(batch, tokens=first + torch.arange(batch.tokens.shape[1]))
            ranks, place = self.engine.mesh.shape.tp, self.engine.mesh.place("tp")
            micro.numbers = prepare(numbered, **options | {"heads": 0}).tokens.chunk(ranks, dim=1)[place].flatten()
            return micro

        def called(stages, stage, micro, *args, **options):
            self._numbers = micro.numbers
            try:
                return call(stages, stage, micro, *args, **options)
            finally:
                self._numbers = None

        def observed(layer, usage):
            _, ids, _ = usage.args  # of Router.usage: those that found room
            if self._numbers is not None:
                seen = self.chosen.setdefault(self.names[layer], {})
                assert len(self._numbers) == len(ids), (len(self._numbers), len(ids))
                seen |= {n: tuple(chosen) for n, chosen in zip(self._numbers.tolist(), ids.tolist()) if n}
            observe[layer](usage)

        native.prepare, Stages._call = prepared, called
        for layer in self.names:
            layer.observe = partial(observed, layer)
        return self

    def __exit__(self, *error) -> None:
        native.prepare, Stages._call, observe = self._before
        for layer, before in observe.items():
            layer.observe = before

    def gathered(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Layer -> token number -> expert ids, the number of experts for what found no room, from all ranks."""
        layers: dict[str, dict[int, tuple[int, ...]]] = {}
        for part in self.engine.mesh.gather(self.chosen):
            for name, chosen in part.items():
                layers.setdefault(name, {}).update(chosen)
        return layers
