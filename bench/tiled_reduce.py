"""Attention, projection and all-reduce in tiles on a limited wire: how much of the sending hides behind the computing.

    sudo .venv/bin/python bench/tiled_reduce.py            # bench/results/tiled_reduce-cpu.md, about 3 minutes

Two ranks stand in network namespaces joined by one wire (bench/wire), whose speed is set so that sending takes half as long as computing,
as long, and twice as long. Needs root, iproute2 and two cores.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tiles.job import Branch, Prompt
from tiles.report import median, page
from wire.network import Network, NoNetwork
from wire.origin import origin
from wire.ranks import RankError, Ranks

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2


class Bench:
    """Ranks on their wire, and what is asked of them."""

    def __init__(self, ranks: Ranks, network: Network, args: argparse.Namespace):
        self.ranks, self.network, self.args = ranks, network, args

    def seconds(self, do: str, **request) -> float:
        """Of the slowest rank."""
        return max(answer["seconds"] for answer in self.ranks.ask(do, **request))

    def each(self, measure: Callable[[int], float], rounds: int) -> dict[str, list[float]]:
        """Every number of tiles in turn, and in the other order every second round, after one time unmeasured."""
        found: dict[str, list[float]] = {str(count): [] for count in self.args.tiles}
        measure(self.args.tiles[0])
        for number in range(rounds):
            for count in self.args.tiles[:: 1 if number % 2 == 0 else -1]:
                found[str(count)].append(measure(count))
        return found

    def branch(self, ratios: Sequence[float]) -> dict:
        """The attention branch on wires on which sending takes `ratios` times as long as computing."""
        compute = self.each(lambda count: self.seconds("attend", count=count, send=False), self.args.rounds)
        wires = []
        for ratio in ratios:
            # Two ranks: each sends the tensor's bytes once, over a wire that both share.
            rate = 8 * RANKS * Branch(*self.args.branch).nbytes / (ratio * median(compute["1"]))
            self.network.limit(rate)
            send = self.each(lambda count: self.seconds("send", count=count), max(1, self.args.rounds // 2))
            both = self.each(lambda count: self.seconds("attend", count=count, send=True), self.args.rounds)
            wires.append({"rate": rate, "send": send, "both": both})
            print(f"wire of {rate / 1e6:.0f} Mbit/s: {', '.join(f'{n} tiles {median(s):.3f} s' for n, s in both.items())}", flush=True)
        self.network.limit(None)
        return {"compute": compute, "wires": wires}

    def prompts(self) -> list[dict]:
        """A model's prompt without a limit, and on a wire on which all sums take about as long as the rest."""

        def measure(count: int) -> float:
            return self.seconds("answer", count=count)

        free = self.each(measure, self.args.rounds)
        rate = 8 * RANKS * Prompt(*self.args.prompt).nbytes / median(free["1"])
        self.network.limit(rate)
        return [{"rate": None, "both": free}, {"rate": rate, "both": self.each(measure, self.args.rounds)}]


def run(args: argparse.Namespace) -> dict:
    """Build the network and the ranks, measure, and take everything down again."""
    before, started = os.getloadavg()[0], time.perf_counter()
    with Network(RANKS) as network, Ranks(RANKS, network, worker=ROOT / "bench/tiles/worker.py") as ranks:
        attention = ranks.ask("build", branch=list(args.branch), prompt=list(args.prompt))[0]["attention"]
        bench = Bench(ranks, network, args)
        found = bench.branch(args.ratios) | {"prompts": bench.prompts(), "attention": attention}
    shapes = {"branch": list(args.branch), "prompt": list(args.prompt)}
    return origin("bench/tiled_reduce.py", before) | shapes | {"seconds": time.perf_counter() - started} | found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of tiles; the first must be 1")
    parser.add_argument("--rounds", type=int, default=4, help="measurements of each (4)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="sending over computing, by the wire's speed")
    parser.add_argument("--tokens", type=int, default=Branch().tokens, help=f"of the branch ({Branch().tokens})")
    parser.add_argument("--prompt-tokens", type=int, default=Prompt().tokens, help=f"of the model's prompt ({Prompt().tokens})")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/results/tiled_reduce-cpu.md", help="Markdown file; a JSON file goes beside it"
    )
    args = parser.parse_args()
    if args.tiles[0] != 1 or args.rounds < 1:
        parser.error("--tiles must begin with 1, --rounds be at least 1")
    args.branch, args.prompt = Branch(tokens=args.tokens), Prompt(tokens=args.prompt_tokens)
    return args


def main() -> None:
    """Measure, or refuse with a sentence where there can be no network."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go when somebody ends this
    try:
        found = run(args)
    except (NoNetwork, RankError) as error:
        sys.exit(f"bench/tiled_reduce.py: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
