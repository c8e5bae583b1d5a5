"""What is measured, in which order: fine-grained and BigMac in turn, on wires of many speeds."""

import statistics
import time
from collections.abc import Callable, Sequence

from job import BIGMAC, FINE, KINDS, TOP_K, Arm, Size
from wire.network import Network
from wire.ranks import Ranks

TRAINING = {4: 0.841, 8: 0.918}
"""The paper's share of all-to-alls in a training step of fine-grained experts, by top-k (motivation table)."""
INFERENCE = {4: 0.792, 8: 0.906}
"""The same of inference."""
TOKENS = (1, 2, 5, 10)
"""New tokens of a generation for which the paper has figures."""
TOLERANCE = 0.005
"""How near to such a share the wire is set."""

Measured = dict[str, float]
"""Of one step over all ranks: `step` seconds, `exchange` seconds in all-to-alls, bytes of `rows`, of `others` and by the `interface`."""


def merged(answers: Sequence[dict]) -> Measured:
    """Ranks' answers as one: the slowest rank's step, the time in all-to-alls, all bytes.

    An all-to-all takes from when the last rank has come until the last one has what it waits for: gloo lets one go before the other, which
    then waits elsewhere. gloo makes a reduce-scatter of an all-reduce, and so sends twice what a ring does.
    """
    sizes = [answer["bytes"] for answer in answers]
    others = sum(size * (1 + (kind == "reduce_scatter")) for of in sizes for kind, size in of.items() if kind != "rows")
    return {
        "step": max(answer["step"] for answer in answers),
        "exchange": sum(max(ends) - max(begins) for begins, ends in (zip(*spans) for spans in zip(*(a["spans"] for a in answers)))),
        "rows": sum(of["rows"] for of in sizes),
        "others": others,
        "interface": sum(answer["interface"] for answer in answers),
    }


def median(measured: Sequence[Measured], key: str) -> float:
    """Of one number of several measurements."""
    return statistics.median(one[key] for one in measured)


def share(measured: Sequence[Measured]) -> float:
    """All-to-alls' share of the time."""
    return median(measured, "exchange") / median(measured, "step")


class Bench:
    """Ranks and their network, and the two ways in which they are asked for something to measure."""

    def __init__(self, ranks: Ranks, network: Network, size: Size, *, say: Callable[[str], None]):
        self.ranks, self.network, self.size, self.say = ranks, network, size, say

    def step(self, arm: Arm) -> Measured:
        """An optimizer step."""
        return merged(self.ranks.ask("step", arm=list(arm)))

    def generate(self, arm: Arm, new: int) -> list[Measured]:
        """Prompts of every rank and `new` tokens after each; the first measurement is that of the prompts."""
        by_rank = self.ranks.ask("generate", arm=list(arm), rows=self.size.sequences, new=new)
        return [merged(answers) for answers in zip(*by_rank)]

    def in_turn(self, measure: Callable[[Arm], object], top_k: int, rounds: int) -> dict[str, list]:
        """Both kinds in turn, and in the other order in every second round."""
        found: dict[str, list] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
                found[kind].append(measure(Arm(kind, top_k)))
        return found

    def calibrate(self, measure: Callable[[], Measured], target: float) -> float:
        """The speed of the wire, in bits per second, at which all-to-alls take `target` of the time that is measured.

        The time is c + d + a: computing, other traffic, all-to-alls. On a slower wire d and a grow alike, so a must be
        target c / (1 - target - target d / a).
        """
        self.network.limit(None)
        measure()
        free = [measure() for _ in range(2)]
        computing = median(free, "step") - median(free, "exchange")
        ratio = free[0]["others"] / free[0]["rows"]
        rate = 8 * free[0]["rows"] / wanted(target, computing, ratio)
        for _ in range(3):
            self.network.limit(rate)
            there = [measure() for _ in range(2)]
            a, found = median(there, "exchange"), share(there)
            self.say(f"  wire of {rate / 1e6:.1f} Mbit/s: all-to-alls take {found:.1%}, wanted are {target:.1%}")
            if abs(found - target) < TOLERANCE:
                break
            computing = median(there, "step") - a * (1 + ratio)
            rate *= a / wanted(target, max(computing, 0.1 * a * (1 - target)), ratio)
        return rate


def wanted(target: float, computing: float, ratio: float) -> float:
    """Seconds that all-to-alls must take beside `computing` and other traffic of `ratio` times their bytes."""
    if 1 - target - target * ratio <= 0:
        raise SystemExit(f"other traffic is {ratio:.0%} of the rows': no wire makes all-to-alls {target:.1%} of the time; use more tokens")
    return target * computing / (1 - target - target * ratio)


def measure(bench: Bench, *, rounds: int, sweep: Sequence[float], sweep_rounds: int) -> dict:
    """Everything, by top-k."""
    return {
        "training": {top_k: training(bench, top_k, rounds=rounds, sweep=sweep, sweep_rounds=sweep_rounds) for top_k in TOP_K},
        "inference": {top_k: inference(bench, top_k, rounds=rounds) for top_k in TOP_K},
    }


def training(bench: Bench, top_k: int, *, rounds: int, sweep: Sequence[float], sweep_rounds: int) -> dict:
    """Steps without a limit, at the paper's share, and over a sweep of speeds."""
    bench.say(f"training, top-{top_k}")
    rate = bench.calibrate(lambda: bench.step(Arm(FINE, top_k)), TRAINING[top_k])
    found = {"paper": {"rate": rate} | bench.in_turn(bench.step, top_k, rounds)}
    report(bench, found["paper"])
    found["sweep"] = []
    for speed in (None, *sweep):
        bench.network.limit(speed)
        bench.step(Arm(BIGMAC, top_k))
        found["sweep"].append({"rate": speed} | bench.in_turn(bench.step, top_k, rounds if speed is None else sweep_rounds))
        report(bench, found["sweep"][-1])
    return found


def report(bench: Bench, found: dict) -> None:
    """A line about a pair of arms."""
    fine, bigmac = (median(found[kind], "step") for kind in (FINE, BIGMAC))
    speed = "no limit" if found["rate"] is None else f"{found['rate'] / 1e6:.1f} Mbit/s"
    bench.say(f"  {speed}: {fine:.2f} s and {bigmac:.2f} s a step, {fine / bigmac:.2f}x, share {share(found[FINE]):.1%}")


def inference(bench: Bench, top_k: int, *, rounds: int) -> dict:
    """Prompts and tokens after them, on a wire that gives the paper's share in the pass over the prompts."""
    bench.say(f"inference, top-{top_k}")
    rate = bench.calibrate(lambda: bench.generate(Arm(FINE, top_k), 1)[0], INFERENCE[top_k])
    started = time.perf_counter()
    found = {"rate": rate} | bench.in_turn(lambda arm: bench.generate(arm, max(TOKENS)), top_k, rounds)
    bench.say(f"  {rounds} rounds in {time.perf_counter() - started:.0f} s")
    return found
