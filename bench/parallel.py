"""The native engine against scripts written by hand for the same mesh: collectives, losses, and CPU time.

    .venv/bin/python bench/parallel.py                                    # everything: bench/results/parallel-cpu.md
    .venv/bin/python bench/parallel.py --only tp2 --rounds 0              # collectives and losses alone
    .venv/bin/python bench/parallel.py --only tp2 --profile               # one step of each side under torch's profiler

bench/README.md says what is compared and how.
"""

import argparse
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path

import torch
from mesh_worlds import report
from mesh_worlds.cases import CASES, Case, first_weights
from mesh_worlds.recorder import Collective, comparable
from mesh_worlds.world import World
from train_peers.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(vocab=8192, dim=512, layers=8, heads=8, ffn=1408, seq=512, batch=4)
SIDES = ("ours", "hand")
WARMUP = 2


@dataclass
class Result:
    """What one mesh gave. `calls` are the collectives by side and rank; `rounds` CPU seconds of a step, all ranks, by side."""

    case: Case
    calls: dict[str, list[list[Collective]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    clock: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @property
    def differences(self) -> list[str]:
        """Collectives that differ, in words."""
        found = []
        for rank, (ours, hand) in enumerate(zip(*(self.calls[side] for side in SIDES))):
            pairs = zip_longest(comparable(ours), comparable(hand), fillvalue="nothing")
            found += [f"rank {rank}, call {i}: {a}; by hand {b}" for i, (a, b) in enumerate(pairs) if a != b]
        return found

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of any step's loss."""
        return max(abs(a - b) / abs(b) for a, b in zip(*(self.losses[side] for side in SIDES)))


class Worlds:
    """The worlds of both sides. They stay for the next mesh of as many ranks, or start afresh for each."""

    def __init__(self, shape: Shape, *, weights: Path, afresh: bool):
        self.shape, self.weights, self.afresh = shape, weights, afresh
        self.open, self.ranks, self.stack = {}, 0, ExitStack()

    def of(self, case: Case) -> dict[str, World]:
        """Both sides on this mesh, by name."""
        if self.afresh or self.ranks != case.ranks:
            self.stack.close()
            self.open, self.ranks = {side: self.stack.enter_context(World(side, case.ranks)) for side in SIDES}, case.ranks
        for world in self.open.values():
            world.build(case, self.shape, weights=self.weights)
        return self.open

    def close(self) -> None:
        """End them."""
        self.stack.close()


def measure(case: Case, worlds: dict[str, World], *, rounds: int, steps: int) -> Result:
    """Both sides on one mesh: warm-up, one recorded step, then rounds in pairs whose order alternates."""
    result = Result(case)
    for side, world in worlds.items():
        result.losses[side] = world.ask("steps", count=WARMUP)[0]["losses"]
        answers = world.ask("record")
        result.losses[side].append(answers[0]["loss"])
        result.calls[side] = [[_collective(call) for call in answer["calls"]] for answer in answers]
    for index in range(rounds):
        for side in SIDES if index % 2 == 0 else SIDES[::-1]:
            answers = worlds[side].ask("steps", count=steps)
            result.losses[side] += answers[0]["losses"]
            result.rounds[side].append(sum(answer["cpu"] for answer in answers) / steps)
            result.clock[side].append(max(answer["seconds"] for answer in answers) / steps)
        ours, hand = (result.rounds[side][-1] for side in SIDES)
        print(f"  round {index + 1} of {rounds}: {ours:.3f} s of CPU a step, by hand {hand:.3f} s", flush=True)
    return result


def _collective(values: list) -> Collective:
    op, ranks, size, moment = values
    return Collective(op, tuple(ranks), size, moment)


def profile(case: Case, worlds: dict[str, World], *, rows: int) -> None:
    """Print rank 0's profile of one step of each side."""
    for side, world in worlds.items():
        world.ask("steps", count=WARMUP)
        print(f"\n## {case.name}, {side}\n\n{world.ask('profile', rows=rows)[0]['text']}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    meshes = [name for name, case in CASES.items() if case.script]
    parser.add_argument("--only", default=",".join(meshes), help=f"of {','.join(meshes)}")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of measurements (9); 0 compares collectives and losses alone")
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a round (2)")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    parser.add_argument("--rows", type=int, default=25, help="ops in the profile (25)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/parallel-cpu.md", help="markdown file")
    for each in fields(Shape):
        parser.add_argument(f"--{each.name}", type=int, help=f"of the shape ({getattr(SHAPE, each.name)})")
    args = parser.parse_args()
    wrong = [name for name in args.only.split(",") if name not in meshes]
    if wrong:
        raise SystemExit(f"--only: {wrong[0]!r} is not one of {', '.join(meshes)}")
    if args.rounds < 0 or args.steps < 1:
        raise SystemExit("--rounds must not be negative, --steps at least 1")
    args.cases = [CASES[name] for name in args.only.split(",")]
    args.shape = replace(SHAPE, **{f.name: getattr(args, f.name) for f in fields(Shape) if getattr(args, f.name) is not None})
    if args.shape.batch != 4:
        raise SystemExit("--batch: the scripts are written for 4 rows a step")
    return args


def main() -> int:
    """Measure what was asked for; 1 if collectives or losses differ. CPU time is reported, not judged: it needs an idle machine."""
    args, started, results = arguments(), time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="bench-parallel-") as folder, ExitStack() as stack:
        weights = Path(folder) / "weights.pt"
        torch.save(first_weights(args.shape), weights)
        worlds = Worlds(args.shape, weights=weights, afresh=args.rounds > 0)
        stack.callback(worlds.close)
        for case in args.cases:
            print(f"{case.name}, {case.ranks} ranks ({time.perf_counter() - started:.0f} s so far)", flush=True)
            if args.profile:
                profile(case, worlds.of(case), rows=args.rows)
                continue
            results.append(measure(case, worlds.of(case), rounds=args.rounds, steps=args.steps))
            print(report.case_text(results[-1]), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            command = "python bench/parallel.py " + shlex.join(sys.argv[1:])
            args.out.write_text(report.page(results, args.shape, command=command.strip()))
    return int(any(result.differences or result.loss_difference > report.LOSS_LIMIT for result in results))


if __name__ == "__main__":
    sys.exit(main())
