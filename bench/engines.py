"""The engines against each other on the same model: CPU time of a step, interleaved, and the losses that show it is the same step.

    .engines-venv/bin/python bench/engines.py          # bench/results/engines-cpu.md; `make .engines-venv/.installed` makes the environment

Each engine is as a run has it, in processes of its own that sleep while another is measured; megatron-core runs through the stand-in for
CUDA of tests/support.
"""

import argparse
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

from mesh_worlds.cases import CASES
from mesh_worlds.world import World
from train_peers.report import commit, machine
from train_peers.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(vocab=8192, dim=512, layers=8, heads=8, ffn=1408, seq=512, batch=4)
ENGINES = ("native", "deepspeed", "megatron")
MESHES = ("one", "dp2")
WARMUP = 2
LOSS_LIMIT = 1e-5
"""Largest relative difference of a step's loss from engine native's."""


@dataclass
class Measured:
    """Of one engine on one mesh: CPU seconds of a step (user and system, all ranks) and of the clock by round, and every step's loss."""

    cpu: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, answers: list[dict], steps: int) -> None:
        """Take a round's answers by rank."""
        self.losses += answers[0]["losses"]
        self.cpu.append(sum(answer["cpu"] for answer in answers) / steps)
        self.clock.append(max(answer["seconds"] for answer in answers) / steps)


def measure(mesh: str, shape: Shape, *, rounds: int, steps: int) -> dict[str, Measured]:
    """Every engine on one mesh, in an order that turns from round to round."""
    found = {engine: Measured() for engine in ENGINES}
    with ExitStack() as stack:
        worlds = {engine: stack.enter_context(World(engine, CASES[mesh].ranks)) for engine in ENGINES}
        for engine, world in worlds.items():
            world.build(CASES[mesh], shape, weights=Path())
            found[engine].losses += world.ask("steps", count=WARMUP)[0]["losses"]
        for index in range(rounds):
            turn = index % len(ENGINES)
            for engine in ENGINES[turn:] + ENGINES[:turn]:
                found[engine].add(worlds[engine].ask("steps", count=steps), steps)
            said = ", ".join(f"{engine} {found[engine].cpu[-1]:.3f} s" for engine in ENGINES)
            print(f"  {mesh}, round {index + 1} of {rounds}: {said} of CPU a step", flush=True)
    return found


def table(mesh: str, found: dict[str, Measured]) -> list[str]:
    """Markdown: medians, spread, and the ratio to engine native's in the same round."""
    native = found["native"]
    head = "| engine | CPU s a step | smallest to largest | over native (range) | clock s | loss off native's |"
    lines = [f"## {mesh}", "", head, "|---|--:|--:|--:|--:|--:|"]
    for engine, one in found.items():
        ratios = sorted(a / b for a, b in zip(one.cpu, native.cpu))
        off = max(abs(a - b) / b for a, b in zip(one.losses, native.losses))
        cells = [f"{median(one.cpu):.3f}", f"{min(one.cpu):.3f} to {max(one.cpu):.3f}"]
        cells += [f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})", f"{median(one.clock):.3f}", f"{off:.1e}"]
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> int:
    """Measure, write the page; 1 if losses part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each engine (9)")
    parser.add_argument("--steps", type=int, default=2, help="steps in each (2)")
    parser.add_argument("--only", nargs="+", choices=MESHES, default=MESHES, help="meshes (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/engines-cpu.md", help="markdown file")
    args = parser.parse_args()
    results = {mesh: measure(mesh, SHAPE, rounds=args.rounds, steps=args.steps) for mesh in args.only}
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "deepspeed", "megatron-core"))
    command = "python bench/engines.py " + shlex.join(sys.argv[1:])
    when = f"{time.strftime('%Y-%m-%d')}, commit {commit()}; {machine()}; {versions}"
    what = f"{SHAPE.parameters / 1e6:.1f} M parameters, {SHAPE.batch} x {SHAPE.seq} tokens a step, fp32, one thread a rank"
    lines = ["# Engines", "", f"`{command.strip()}`, {when}.", "", f"{what}; medians of {args.rounds} rounds.", ""]
    for mesh, found in results.items():
        lines += table(mesh, found)
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))
    pairs = [(one, found["native"]) for found in results.values() for one in found.values()]
    return int(max(abs(a - b) / b for one, native in pairs for a, b in zip(one.losses, native.losses)) > LOSS_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
