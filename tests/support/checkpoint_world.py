"""Checkpoints of real engines between meshes: one world saves and goes on, another loads and must go on alike."""

from pathlib import Path

import numpy as np
import torch
from engine_gradients import full
from parity_rows import Row
from sameness import BASE, Documents, build_engine, merge

from llmtrain.config.run import RunConfig
from llmtrain.config.train import CheckpointConfig
from llmtrain.layout.steps import StepPlan
from llmtrain.stages.results import full_weights
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.checkpoint_state import own_part
from llmtrain.train.stream import micro_batches

BEFORE, AFTER = 3, 3
"""Steps taken before the checkpoint, and after it."""


class Run:
    """An engine and its place in the data."""

    def __init__(self, row: Row):
        torch.set_num_threads(1)
        self.cfg = RunConfig.model_validate(merge(BASE, row.scenario("fp64")["changes"]))
        self.engine = build_engine(self.cfg)
        self.mesh, self.plan, self.data, self.next_step = self.engine.mesh, StepPlan.from_config(self.cfg), Documents(), 0
        self.samples: list[list[int]] = []
        """Samples of each step taken, read by all data-parallel ranks together, in order; one that two of them read is there twice."""

    @property
    def position(self) -> int:
        """The next sample."""
        return self.plan.step(self.next_step).first_sample

    def go_to(self, position: int) -> None:
        """Go on with the step that begins with sample `position`."""
        self.next_step = [self.plan.step(index).first_sample for index in range(self.plan.steps)].index(position)

    def steps(self, count: int) -> list[float]:
        """Losses of the next `count` steps."""
        losses = []
        for index in range(self.next_step, self.next_step + count):
            step = self.plan.step(index)
            batches = micro_batches(step, self.data, rank=self.mesh.data_rank, ranks=self.mesh.shape.dp)
            first_of_its_data = not any(self.mesh.place(axis) for axis in ("pp", "cp", "tp"))
            mine = [sample for batch in batches for sample in batch.samples] if first_of_its_data else []
            self.samples.append(sorted(sample for part in self.mesh.gather(mine) for sample in part))
            losses.append(self.engine.forward_backward(batches).loss)
            self.engine.grad_norm()
            self.engine.apply(lr=step.lr)
        self.next_step += count
        return losses

    def whole_state(self) -> dict[str, np.ndarray]:
        """Weights and moments of all ranks' stages."""
        mine = {name: full(tensor).detach().clone().numpy() for name, tensor in self.engine.state().items()}
        return {name: value for part in self.mesh.gather(mine) for name, value in part.items()}


def save(cases: dict[str, tuple[str, Row]]) -> dict[str, dict]:
    """Train, save into the case's folder, go on: the state as saved, what each rank handed over to be written, and the losses after."""
    results = {}
    for name, (folder, row) in cases.items():
        run = Run(row)
        run.steps(BEFORE)
        checkpointer = Checkpointer(Path(folder), CheckpointConfig(), timeout=60)
        state = run.engine.state()
        checkpointer.save(run.next_step, state, {"step": run.next_step, "position": run.position})
        own = own_part(state, rank=run.mesh.rank, world=run.mesh.world)
        written = {key: full_size(tensor) for key, tensor in own.items()}
        expected = run.whole_state()
        losses = run.steps(AFTER)
        checkpointer.wait()
        assert checkpointer.failed is None, checkpointer.failed
        names = run.mesh.gather(sorted(state))
        results[name] = {"state": expected, "losses": losses, "written": run.mesh.gather(written), "names": names}
        results[name]["samples"] = run.samples
        run.mesh.leave()
    return results


def full_size(tensor: torch.Tensor) -> int:
    """Elements of this rank's part."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def load(cases: dict[str, tuple[str, Row]]) -> dict[str, dict]:
    """Load each case's newest checkpoint into this world and go on: the state as loaded, the position, the losses after."""
    results = {}
    for name, (folder, row) in cases.items():
        run = Run(row)
        checkpointer = Checkpointer(Path(folder), CheckpointConfig(), timeout=60, writable=False)
        state = run.engine.state()
        for tensor in state.values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).fill_(-7)  # all of it must come from the files
        meta = checkpointer.load(checkpointer.newest(), state)
        run.engine.load_state(state)
        run.go_to(meta["position"])
        loaded = run.whole_state()
        results[name] = {"state": loaded, "step": meta["step"], "losses": run.steps(AFTER), "samples": run.samples}
        run.mesh.leave()
    return results


def exported(cases: dict[str, Row]) -> dict[str, dict[str, np.ndarray]]:
    """Weights after a few steps, as rank 0 would export them."""
    found = {}
    for name, row in cases.items():
        run = Run(row)
        run.steps(BEFORE)
        found[name] = {key: tensor.numpy().copy() for key, tensor in full_weights(run.engine, run.mesh)}
        run.mesh.leave()
    return found
