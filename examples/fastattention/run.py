"""FastAttention (arXiv 2410.16663): the paper's claims beside what this machine finds.

    .venv/bin/python examples/fastattention/run.py      # prints the page and writes results.md, a minute or two

It needs no accelerator. What `make test-kernels` installs (Triton, NVRTC, triton-ascend) is used where it is there; else the page says what
is missing. It ends with exit code 1 if an implementation leaves its bound.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT / "tests/kernels/support")]

import compiled  # noqa: E402
import counts  # noqa: E402
import page  # noqa: E402
import together  # noqa: E402
from wire.origin import origin  # noqa: E402


def numbers(python: Path, seed: int, quick: bool) -> dict:
    """What numerics.py finds. SystemExit if it fails."""
    command = [python, HERE / "numerics.py", str(seed), "quick" if quick else "full"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"numerics.py ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def find(args: argparse.Namespace) -> dict:
    """All that the page says, in turn."""
    before, started = os.getloadavg()[0], time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    python, length = compiled.kernels_python(), 1024 if args.quick else 4096
    found = {"length": length, "seed": args.seed}
    say("masks, tiles, memory")
    found |= {"mask": counts.mask(length), "counts": counts.counts(length), "held": counts.held([length * 2**n // 4 for n in range(4)])}
    say(f"implementations against float64 ({python})")
    found["numbers"] = numbers(python, args.seed, args.quick)
    say("sums in tiles, the plan of a long sequence")
    found |= {"reduced": together.reduced(4), "bench": together.reduce_bench(), "plan": together.plan()}
    say("compilers")
    skipped = ["left out with --quick"]
    found["compiled"] = {
        "Volta, CUDA C++": skipped if args.quick else compiled.volta(python),
        "sm_90, Triton": skipped if args.quick else compiled.triton_cuda(python),
        "Ascend 910B2, Triton": skipped if args.quick else compiled.triton_ascend(),
    }
    say("done")
    return origin("examples/fastattention/run.py", before) | {"seconds": time.perf_counter() - started} | found


def main() -> None:
    """Find, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short sequences, one call per implementation, no compilers")
    parser.add_argument("--seed", type=int, default=None, help="of the numbers that implementations compute with (drawn)")
    parser.add_argument("--out", type=Path, default=HERE / "results.md", help="Markdown file (results.md beside this one)")
    args = parser.parse_args()
    args.seed = int.from_bytes(os.urandom(2), "big") if args.seed is None else args.seed
    found = find(args)
    text = page.page(found)
    args.out.write_text(text)
    print(text)
    if wrong := page.beyond(found["numbers"]):
        sys.exit(f"above their bounds: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
