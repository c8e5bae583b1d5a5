"""This rank's micro-batches, step after step, read ahead in the background."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.data.prefetch import prefetch
from llmtrain.layout.steps import Phase, Step, StepPlan


def micro_batches(step: Step, dataset, *, rank: int, ranks: int) -> list[Batch]:
    """What data-parallel rank `rank` of `ranks` runs in `step`: micro-batch m takes samples from (m x ranks + rank) x micro_batch on."""
    count, local = step.micro_batch, step.first_sample - step.phase.first_sample
    batches = [dataset.batch(local + first, count) for first in range(rank * count, step.batch, ranks * count)]
    offset = step.phase.first_sample
    return [replace(batch, samples=tuple(offset + sample for sample in batch.samples)) for batch in batches]


def step_stream(
    plan: StepPlan, *, start: int, dataset_of: Callable[[Phase], object], rank: int, ranks: int, depth: int
) -> Iterator[tuple[Step, list[Batch]]]:
    """(step, micro-batches) from step `start` to the end of the plan; `dataset_of(phase)` is called once per phase reached."""

    def read() -> Iterator[tuple[Step, list[Batch]]]:
        phase = dataset = None
        for index in range(start, plan.steps):
            step = plan.step(index)
            if step.phase is not phase:
                phase, dataset = step.phase, dataset_of(step.phase)
            yield step, micro_batches(step, dataset, rank=rank, ranks=ranks)

    return prefetch(read(), depth)


def validation_batches(dataset, *, samples: int, micro_batch: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's share of the first `samples` samples. Every rank gets equally many micro-batches, some without targets."""
    batches = []
    for first in range(rank * micro_batch, -(-samples // (ranks * micro_batch)) * ranks * micro_batch, ranks * micro_batch):
        if first < samples:
            batches.append(dataset.batch(first, min(micro_batch, samples - first)))
        else:
            spare = dataset.batch(0, 1)
            batches.append(replace(spare, targets=spare.targets.new_full(spare.targets.shape, NO_TARGET)))
    return batches
