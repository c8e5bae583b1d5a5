"""Which experts every token of a step goes to, whatever the mesh: tokens are told apart by a number that travels as they do."""

from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.engine import native
from llmtrain.engine.stages import Stages
from llmtrain.model.router import Router


class Routing:
    """A context in which an engine's step is watched. Nothing is recorded for a model without experts.

    A batch whose token ids are (sample, position) numbers goes through the engine's own `prepare`, so cp and tp deal the numbers out
    as they do the tokens. A router called outside of a stage's forward pass recomputes and is not looked at.
    """

    def __init__(self, engine):
        self.engine = engine
        parts = engine.stages.parts.values()
        self.names = {module: name for part in parts for name, module in part.named_modules() if isinstance(module, Router)}
        self.chosen: dict[str, dict[int, tuple[int, ...]]] = {}
        self._numbers: Tensor | None = None

    def __enter__(self) -> "Routing":
        self._before = native.prepare, Stages._call, Router.forward
        prepare, call, route = self._before

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

        def routed(router, x):
            choice = route(router, x)
            ids = choice.ids
            if self._numbers is not None:
                layer = self.chosen.setdefault(self.names[router], {})
                assert len(self._numbers) == len(ids), (len(self._numbers), len(ids))
                layer |= {n: tuple(chosen) for n, chosen in zip(self._numbers.tolist(), ids.tolist()) if n}
            return choice

        native.prepare, Stages._call, Router.forward = prepared, called, routed
        return self

    def __exit__(self, *error) -> None:
        native.prepare, Stages._call, Router.forward = self._before

    def gathered(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Layer -> token number -> expert ids, from all ranks."""
        layers: dict[str, dict[int, tuple[int, ...]]] = {}
        for part in self.engine.mesh.gather(self.chosen):
            for name, chosen in part.items():
                layers.setdefault(name, {}).update(chosen)
        return layers
