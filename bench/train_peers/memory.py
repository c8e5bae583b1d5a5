"""Peak memory of a training step, each contender in a fresh process."""

from dataclasses import asdict, dataclass

from train_peers.pool import Process
from train_peers.shape import Shape

STEPS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes: the process's peak, its resident set after the imports, and 16 a parameter for the training state."""

    name: str
    vocab: int
    dtype: str
    peak: int
    imported: int
    state: int

    @property
    def above(self) -> int:
        """Activations, logits, casts, temporary buffers."""
        return self.peak - self.imported - self.state


def measure(name: str, shape: Shape, *, dtype: str, compiled: bool, options) -> Memory:
    """Build `name`, take STEPS steps, look at the peak. `options` has threads and overrides.

    Raises WorkerError, also when the process was killed for its memory.
    """
    with Process(name, threads=options.threads) as worker:
        built = worker.ask("build", name=name, shape=asdict(shape), dtype=dtype, compiled=compiled, overrides=options.overrides)
        worker.ask("steps", count=STEPS)
        peak = worker.ask("peak")["peak"]
    return Memory(name, shape.vocab, dtype, peak=peak, imported=built["imported"], state=shape.state_bytes)
