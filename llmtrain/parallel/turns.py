"""Two halves of a pair take turns: what one has sent is under way while the other computes.

Each half runs in a thread of its own, and one thread runs at any time, until it hands over. So both do the same in the same order on every
rank, each has the graph and the hooks that it has alone, and nothing in a model has to know. (torchtitan's DualPipeV runs backward passes
in a second thread, too.)
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, wait

from llmtrain.parallel.hang.record import Field
from llmtrain.parallel.hang.where import HERE

PLACE = (Field.MICRO_BATCH, Field.LAYER, Field.DIRECTION)
"""What the report of a hang would say wrongly if both halves marked it."""


class Abandoned(RuntimeError):
    """The other half of the pair failed."""


class Turns:
    """Whose turn it is. The first half runs in another thread, or in those that autograd gives it, the second in the one that made this."""

    def __init__(self):
        self._second = threading.get_ident()
        self._go = threading.Semaphore(0), threading.Semaphore(0)  # of the first, of the second
        self._over: BaseException | bool = False
        """Whether a half has ended, and what it raised."""

    def hand_over(self) -> None:
        """Let the other half go on until it hands over or ends. Raises Abandoned if it failed."""
        if not self._over:
            me, place = threading.get_ident() == self._second, [HERE.slots[field] for field in PLACE]
            self._go[not me].release()
            self._go[me].acquire()
            for field, value in zip(PLACE, place):
                HERE.slots[field] = value
        if isinstance(self._over, BaseException):
            raise Abandoned("the other half of a pair of micro-batches failed") from self._over

    def first(self, work: Callable[[], None]) -> None:
        """Do the first half's work."""
        self._run(work, other=1)

    def second(self, work: Callable[[], None]) -> None:
        """Wait until the first half hands over or ends, then do the second's work."""
        self._go[1].acquire()
        if not isinstance(self._over, BaseException):
            self._run(work, other=0)

    def _run(self, work: Callable[[], None], *, other: int) -> None:
        try:
            work()
        except BaseException as error:
            self._over = self._over or error
            raise
        finally:
            self._over = self._over or True
            self._go[other].release()


_now: Turns | None = None
"""Of the pair that is carried out; one per process, as there is one pipeline."""


def hand_over() -> None:
    """Something was sent and is waited for later: the other half of a pair, if there is one, may compute."""
    if _now is not None:
        _now.hand_over()


def together(first: Callable[[], None], second: Callable[[], None], *, beside: Executor) -> None:
    """Run both in turns, `first` in a thread of `beside`; an error of either ends both and is raised."""
    global _now
    turns = _now = Turns()
    running = beside.submit(turns.first, first)
    try:
        turns.second(second)
    except Abandoned:
        pass  # `running` says why
    finally:
        wait([running])
        _now = None
    running.result()
