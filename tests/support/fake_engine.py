"""A second engine, to hold the interface to what it promises: a table of next-token logits trained by plain SGD, no model, no mesh."""

import torch

from llmtrain.engine.base import Capabilities, StepResult, register_engine


@register_engine("table")
def build(cfg, *, objective, mesh, device, ops):
    """The engine that `engine: table` would name."""
    return TableEngine(cfg, objective=objective, mesh=mesh, discard=True)


class TableEngine:
    """Logits [V, V] by current token; cross-entropy by the objective; one process or more, gradients summed over ranks."""

    def __init__(self, cfg, *, objective, mesh, discard: bool):
        size = cfg.model.vocab_size
        self.cfg, self.objective, self.mesh, self.can_discard = cfg, objective, mesh, discard
        self.table = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)
        self.steps_taken, self.discarded, self.rope_base = 0, 0, None

    def capabilities(self):
        return Capabilities(discard=self.can_discard, axes=("dp_replicate",), dtypes=("fp64", "fp32"))

    def _loss(self, batch):
        return torch.nn.functional.cross_entropy(self.table[batch.tokens].flatten(0, 1), batch.targets.flatten(), reduction="sum")

    def forward_backward(self, micro_batches):
        total = int(self.mesh.sum(sum(batch.target_count for batch in micro_batches))[0])
        losses = [self._loss(batch) for batch in micro_batches]
        for loss in losses:
            (self.objective({"ce_sum": loss}) / total).backward()
        if self.mesh.world > 1:
            torch.distributed.all_reduce(self.table.grad)
        return StepResult(loss_sum=self.mesh.sum(sum(loss.item() for loss in losses))[0], target_count=total)

    def grad_norm(self):
        return self.table.grad.norm().item()

    def overflowed(self):
        return False

    @torch.no_grad()
    def apply(self, *, lr):
        self.table -= lr * self.table.grad
        self.table.grad, self.steps_taken = None, self.steps_taken + 1

    def discard(self):
        self.table.grad, self.discarded = None, self.discarded + 1

    @torch.no_grad()
    def evaluate(self, micro_batches):
        total = int(self.mesh.sum(sum(batch.target_count for batch in micro_batches))[0])
        return StepResult(loss_sum=self.mesh.sum(sum(self._loss(batch).item() for batch in micro_batches))[0], target_count=total)

    @torch.no_grad()
    def logits(self, tokens, *, positions=None):
        return self.table[tokens]

    def begin_phase(self, *, rope_base):
        self.rope_base = rope_base

    def calibrate(self, batch):
        return {}

    def state(self):
        return {"step": torch.tensor(self.steps_taken), "table.weight": self.table.detach()}

    def load_state(self, state):
        self.steps_taken = int(state["step"])
        with torch.no_grad():
            self.table.copy_(state["table.weight"])

    def extra_state(self):
        return {}

    def load_extra_state(self, extra):
        pass
