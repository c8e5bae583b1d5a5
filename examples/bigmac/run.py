"""BigMac against fine-grained experts on a network of this machine's own, slow enough for all-to-alls to matter.

    sudo .venv/bin/python examples/bigmac/run.py        # writes results.json, results.md and results.png

Ranks stand in network namespaces joined by one wire (network.py), run the same job with both kinds of experts in turn (job.py, worker.py),
first on a wire so slow that all-to-alls take the paper's share of a fine-grained step, then over a sweep of speeds, then in generation.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from job import Size
from measure import Bench, measure
from network import Network, NoNetwork
from ranks import RankError, Ranks
from report import write

HERE = Path(__file__).resolve().parent
SWEEP = (2000, 1000, 500, 250, 125)


def made(ranks: int, before: float) -> dict:
    """Where results come from. `before` is the load average when the measurement began."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "machine": f"{processor}, {os.cpu_count()} logical cores, Linux {platform.release()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": f"python {' '.join(['examples/bigmac/run.py', *sys.argv[1:]])}",
        "ranks": ranks,
        "load": [before, os.getloadavg()[1]],
    }


def run(args: argparse.Namespace) -> dict:
    """Build the network and the ranks, measure, and take everything down again."""
    size, before, started = Size(sequences=args.sequences), os.getloadavg()[0], time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    with Network(args.ranks) as network, Ranks(args.ranks, network) as ranks:
        parameters = ranks.ask("build", size=list(size))[0]
        bench = Bench(ranks, network, size, say=say)
        found = measure(bench, rounds=args.rounds, sweep=[1e6 * rate for rate in args.sweep], sweep_rounds=args.sweep_rounds)
    return made(args.ranks, before) | {"size": size._asdict(), "parameters": parameters, "seconds": time.perf_counter() - started} | found


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
