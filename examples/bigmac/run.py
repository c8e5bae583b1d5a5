"""BigMac against fine-grained experts on a network of this machine's own, slow enough for all-to-alls to matter.

    sudo .venv/bin/python examples/bigmac/run.py        # writes results.json, results.md and results.png

Ranks stand in network namespaces joined by one wire (bench/wire), run the same job with both kinds of experts in turn (job.py, worker.py),
first on a wire so slow that all-to-alls take the paper's share of a fine-grained step, then over a sweep of speeds, then in generation.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "bench"))

from job import Size  # noqa: E402
from measure import Bench, measure  # noqa: E402
from report import write  # noqa: E402
from wire.network import Network, NoNetwork  # noqa: E402
from wire.origin import origin  # noqa: E402
from wire.ranks import RankError, Ranks  # noqa: E402

SWEEP = (2000, 1000, 500, 250, 125)


def run(args: argparse.Namespace) -> dict:
    """Build the network and the ranks, measure, and take everything down again."""
    size, before, started = Size(sequences=args.sequences), os.getloadavg()[0], time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    with Network(args.ranks) as network, Ranks(args.ranks, network, worker=HERE / "worker.py") as ranks:
        parameters = ranks.ask("build", size=list(size))[0]
        bench = Bench(ranks, network, size, say=say)
        found = measure(bench, rounds=args.rounds, sweep=[1e6 * rate for rate in args.sweep], sweep_rounds=args.sweep_rounds)
    return (
        origin("examples/bigmac/run.py", before)
        | {"ranks": args.ranks, "size": size._asdict(), "parameters": parameters, "seconds": time.perf_counter() - started}
        | found
    )


def main() -> None:
    """Measure, or only write the tables again; refuse with a sentence where there can be no network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4))
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind at the paper's share (5)")
    parser.add_argument("--sweep", type=float, nargs="*", default=list(SWEEP), metavar="MBIT", help="speeds of the wire, in Mbit/s")
    parser.add_argument("--sweep-rounds", type=int, default=3, help="steps of each kind at each of them (3)")
    parser.add_argument("--sequences", type=int, default=Size().sequences, help="sequences of 128 tokens that a rank computes in a step")
    parser.add_argument("--name", default="results", help="of the files that are written beside this one (results)")
    parser.add_argument("--report", action="store_true", help="write the table and the plot of an earlier run's JSON again")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go when somebody ends this
    path = HERE / f"{args.name}.json"
    if not args.report:
        try:
            path.write_text(json.dumps(run(args), indent=1) + "\n")
        except (NoNetwork, RankError) as error:
            sys.exit(f"examples/bigmac/run.py: {error}")
    write(json.loads(path.read_text()), path)


if __name__ == "__main__":
    main()
