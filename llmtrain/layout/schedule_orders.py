"""In which order one rank of a pipeline computes, per kind of schedule.

Every order takes (rank, ranks p, virtual stages v, micro-batches n) and returns the rank's compute actions. Micro-batches of one stage
come in ascending order in each of F, B, I and W, so an order only says which stage is next; `_Order` counts the micro-batches.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

from llmtrain.layout.schedule_actions import OVERLAP, Action, stage_rank


class _Order:
    """A list of actions under construction. Micro-batches from `limit` on are left out."""

    def __init__(self, limit: int):
        self.limit = limit
        self.actions: list[Action] = []
        self._forwards: dict[int, int] = defaultdict(int)
        self._backwards: dict[int, int] = defaultdict(int)
        self._waiting: deque[Action] = deque()

    def forward(self, stage: int) -> None:
        self._add(self._forward(stage))

    def backward(self, stage: int) -> None:
        self._add(self._backward("B", stage))

    def inputs(self, stage: int) -> None:
        """The backward for inputs; the one for weights then waits."""
        action = self._backward("I", stage)
        self._waiting.append(action._replace(kind="W"))
        self._add(action)

    def weights(self, stage: int | None = None) -> None:
        """The backward for weights that has waited longest (at `stage`)."""
        action = next(a for a in self._waiting if stage in (None, a.stage))
        self._waiting.remove(action)
        self._add(action)

    def all_weights(self, stage: int | None = None) -> None:
        """Every backward for weights that waits (at `stage`)."""
        while any(stage in (None, a.stage) for a in self._waiting):
            self.weights(stage)

    def overlap(self, forward: int, backward: int) -> None:
        """A forward and a whole backward that may run together."""
        self.actions.append(Action(OVERLAP, -1, -1, (self._forward(forward), self._backward("B", backward))))

    def _forward(self, stage: int) -> Action:
        self._forwards[stage] += 1
        return Action("F", stage, self._forwards[stage] - 1)

    def _backward(self, kind: str, stage: int) -> Action:
        self._backwards[stage] += 1
        return Action(kind, stage, self._backwards[stage] - 1)

    def _add(self, action: Action) -> None:
        if action.micro_batch < self.limit:
            self.actions.append(action)


def gpipe(rank: int, p: int, v: int, n: int) -> list[Action]:
    """All forwards, then all backwards; stage by stage where a rank holds several (Huang et al. 2018, arXiv 1811.06965)."""
    stages = range(rank, p * v, p)
    order = _Order(n)
    for stage in _by_rounds(stages, [n]):
        order.forward(stage)
    for stage in _by_rounds(stages[::-1], [n]):
        order.backward(stage)
    return order.actions


def one_f_one_b(rank: int, p: int, v: int, n: int) -> list[Action]:
    """p - 1 - rank forwards, then one forward and one backward in turn (PipeDream-flush, arXiv 2104.04473 section 2.2)."""
    stages = [rank] * n
    return _alternate(stages, stages, warmup=p - 1 - rank, n=n)


def interleaved(rank: int, p: int, v: int, n: int) -> list[Action]:
    """1F1B over v stages per rank (arXiv 2104.04473 section 2.2): each round of micro-batches goes through one stage after the other.

    A stage's forward comes back to its rank p units later, and its first backward another 2 (p - 1 - rank) units after that of the
    last rank: so many forwards go before the first backward.
    """
    stages, sizes = range(rank, p * v, p), rounds(n, p)
    warmup = (v - 1) * sizes[0] + 2 * (p - 1 - rank)
    return _alternate(_by_rounds(stages, sizes), _by_rounds(stages[::-1], sizes), warmup=warmup, n=n)


def interleaved_pairs(rank: int, p: int, v: int, n: int) -> list[Action]:
    """The same with one more forward ahead, so that each F and the B after it are of different micro-batches and may overlap.

    As MindSpeed's --moe-fb-overlap.
    """
    stages, sizes = range(rank, p * v, p), rounds(n, p)
    forwards, backwards = _by_rounds(stages, sizes), _by_rounds(stages[::-1], sizes)
    order, warmup = _Order(n), min((v - 1) * sizes[0] + 2 * (p - 1 - rank) + 1, n * v)
    for stage in forwards[:warmup]:
        order.forward(stage)
    for forward, backward in zip(forwards[warmup:], backwards):
        order.overlap(forward, backward)
    for stage in backwards[n * v - warmup :]:
        order.backward(stage)
    return order.actions


def zero_bubble(rank: int, p: int, v: int, n: int) -> list[Action]:
    """Backwards split in inputs and weights, the latter `rank` steps behind (ZB-H1, arXiv 2401.10241 section 2), over v stages.

    The backward for inputs passes a rank in one unit as the forward does, so half the extra warm-up of `interleaved` is enough, and
    a later rank, which waits less at the end, keeps more weights for then.
    """
    stages, sizes, order = range(rank, p * v, p), rounds(n, p), _Order(n)
    forwards, backwards = _by_rounds(stages, sizes), _by_rounds(stages[::-1], sizes)
    warmup = min((v - 1) * sizes[0] + p - 1 - rank, len(forwards))
    for stage in forwards[:warmup]:
        order.forward(stage)
    for step, stage in enumerate(backwards):
        if warmup + step < len(forwards):
            order.forward(forwards[warmup + step])
        order.inputs(stage)
        if step >= rank:
            order.weights()
    order.all_weights()
    return order.actions


def zbv(rank: int, p: int, v: int, n: int) -> list[Action]:
    """Zero bubble on a V (arXiv 2401.10241 section 6): a rank holds stages `down` and `up`, and keeps activations of 2p at most.

    Written for N >= 2p - 1 micro-batches; with fewer, those that do not exist are left out.
    """
    down, up = (stage for stage in range(2 * p) if stage_rank(stage, ranks=p, placement="v") == rank)
    order, count = _Order(n), max(2 * p - 1, n)
    for _ in range(2 * (p - rank) - 1):  # until the first micro-batch is back from the turn
        order.forward(down)
    for _ in range(rank):
        order.forward(up)
        order.forward(down)
    for _ in range(p - rank):  # until its gradient is back from the turn
        order.forward(up)
        _split_backward(order, up)
    for step in range(count - p):
        if step < count - 2 * p + 1 + rank:
            order.forward(down)
        _split_backward(order, down)
        order.forward(up)
        _split_backward(order, up)
    for _ in range(rank):  # others wait for these gradients, nobody for the weights
        order.inputs(down)
        order.inputs(up)
    for _ in range(p - rank):
        order.inputs(down)
        order.weights(down)
    order.all_weights(up)
    order.all_weights(down)
    return order.actions


def dualpipev(rank: int, p: int, v: int, n: int) -> list[Action]:
    """DualPipe cut in half (DeepSeek-V3, arXiv 2412.19437 section 3.2.1; the V by Sea AI Lab): pairs of an F and a B that may overlap.

    Needs n >= 2p: every rank has both of a pair at hand in the main part.
    """
    down, up = (stage for stage in range(2 * p) if stage_rank(stage, ranks=p, placement="v") == rank)
    order, after = _Order(n), p - 1 - rank
    for _ in range(2 * after):
        order.forward(down)
    for _ in range(rank + 1):
        order.forward(down)
        order.forward(up)
    for _ in range(after):
        _split_backward(order, up)
        order.forward(up)
    for step in range(n - 2 * p + rank + 1):
        if step == 0 and rank == p - 1:  # at the turn the next rank waits for F alone
            order.forward(down)
            order.backward(up)
        else:
            order.overlap(down, up)
        order.overlap(up, down)
    for _ in range(after):
        order.backward(up)
        order.overlap(up, down)
    for step in range(2 * (rank + 1)):  # the second half keeps its weights for the end
        (order.backward if step <= rank else order.inputs)((up, down)[step % 2])
    for _ in range(after):
        order.weights()
        order.inputs(down)
    order.all_weights()
    return order.actions


def forwards(stages: Sequence[int], p: int, n: int) -> list[Action]:
    """Forwards alone, p micro-batches at a time through one of the rank's `stages` after the other."""
    order = _Order(n)
    for stage in _by_rounds(stages, [min(p, n - first) for first in range(0, n, p)]):
        order.forward(stage)
    return order.actions


def rounds(n: int, p: int) -> list[int]:
    """Sizes of the rounds in which n micro-batches pass: at least p each (n if fewer), as even as possible, larger ones first."""
    count = max(1, n // p)
    return [n // count + (i < n % count) for i in range(count)]


def _by_rounds(stages: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [stage for size in sizes for stage in stages for _ in range(size)]


def _alternate(forwards: Sequence[int], backwards: Sequence[int], *, warmup: int, n: int) -> list[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards left over."""
    order, warmup = _Order(n), min(warmup, len(forwards))
    for stage in forwards[:warmup]:
        order.forward(stage)
    for step, stage in enumerate(backwards):
        if warmup + step < len(forwards):
            order.forward(forwards[warmup + step])
        order.backward(stage)
    return order.actions


def _split_backward(order: _Order, stage: int) -> None:
    order.inputs(stage)
    order.weights(stage)
