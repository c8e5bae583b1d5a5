"""The Triton attention kernel against PyTorch's scaled_dot_product_attention (flash and cuDNN) on a CUDA GPU, as TFLOP/s.

    python bench/attention.py                  # bf16, head dims 64 and 128, S 1K to 32K -> bench/results/attention-GPU.md
    python bench/attention.py --seq 1024,4096 --head-dim 128 --rounds 5 --out /tmp/try.md

Contenders take turns: a round calls each of them once per case, who begins rotates, and the median of the rounds counts. First every
contender's output and gradients are held against the formula in fp32; one that is off is named and not timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from llmtrain_kernels import Mask, triton_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.ops.attention import attention_reference

HIDDEN, TOKENS = 2048, 32768
"""Heads x head dim and batch rows x S, the same for all cases."""

CHECKED, BOUND = 512, 3e-2
"""S at which outputs are compared, and the largest difference in units of the largest number: bf16 has 8 bits."""

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Clock = Callable[[Callable[[], object]], float]


class Case(NamedTuple):
    """Shape of one row of a table."""

    head_dim: int
    causal: bool
    seq: int

    def tensors(self, device: str, *, hidden: int = HIDDEN, tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """q, k, v and the gradient of the output, [B,H,S,d]."""
        shape = (max(1, tokens // self.seq), hidden // self.head_dim, self.seq, self.head_dim)
        return [torch.randn(shape, device=device, dtype=dtype, requires_grad=last < 3) for last in range(4)]

    def flop(self, q: Tensor) -> int:
        """Of the forward pass: two products of S x S x d a head, half of it under a causal mask. The backward pass counts 2.5 times."""
        rows, heads, seq, width = q.shape
        return 4 * rows * heads * seq * seq * width // (2 if self.causal else 1)


def by_sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One backend of PyTorch, or an error where it cannot serve."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def by_triton(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """kernels.attention: fast."""
    return triton_attention.attention(q, k, v, mask=Mask(causal=causal))


CONTENDERS: Mapping[str, Attention] = {
    "fast": by_triton,
    "sdpa flash": partial(by_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa cuDNN": partial(by_sdpa, SDPBackend.CUDNN_ATTENTION),
}


def worst(attention: Attention, tensors: list[Tensor], causal: bool) -> float:
    """The largest difference of output and gradients from the formula in fp32, in units of the largest number of each."""
    inputs, grad = tensors[:3], tensors[3]
    found, wanted = [], []
    for values, run in ((found, attention), (wanted, lambda q, k, v, causal: attention_reference(q, k, v, mask=Mask(causal=causal)))):
        copies = [x.detach().to(x.dtype if values is found else torch.float32).requires_grad_() for x in inputs]
        out = run(*copies, causal)
        values += [out, *torch.autograd.grad(out, copies, grad.to(out.dtype))]
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted))


def cuda_clock(call: Callable[[], object]) -> float:
    """Seconds of a call on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def cpu_clock(call: Callable[[], object]) -> float:
    """Seconds of a call on the CPU, for the tests of this script."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(contenders: Mapping[str, Attention], case: Case, tensors: list[Tensor], *, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Median seconds of the forward and of the backward pass by contender; two rounds more, which are not counted, come first."""
    names = list(contenders)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            outs: list[Tensor] = []
            forward = clock(lambda name=name, outs=outs: outs.append(contenders[name](*tensors[:3], case.causal)))
            backward = clock(lambda outs=outs: torch.autograd.grad(outs[0], tensors[:3], tensors[3]))
            if turn >= 2:
                seconds[name].append((forward, backward))
    return {name: [statistics.median(part) for part in zip(*values)] for name, values in seconds.items()}


def row(case: Case, flop: int, medians: Mapping[str, list[float]]) -> str:
    """A line of the table: TFLOP/s forward and backward of each contender, and ours over the best of the others."""
    rates = {name: [flop / forward / 1e12, 2.5 * flop / backward / 1e12] for name, (forward, backward) in medians.items()}
    others = [rate for name, rate in rates.items() if name != "fast"]
    best = [max(part) for part in zip(*others)] if others and "fast" in rates else None
    cells = [f"{rates[name][0]:.1f} / {rates[name][1]:.1f}" if name in rates else "-" for name in CONTENDERS]
    cells.append(f"{rates['fast'][0] / best[0]:.2f} / {rates['fast'][1] / best[1]:.2f}" if best else "-")
    return f"| {case.head_dim} | {'causal' if case.causal else 'full'} | {case.seq:,} | {' | '.join(cells)} |"


def served(device: str, head_dims: list[int], **sizes: int) -> tuple[dict[str, Attention], list[str]]:
    """The contenders that compute the right thing here, and a line about each of the others."""
    good, said = {}, []
    for name, attention in CONTENDERS.items():
        try:
            found = max(worst(attention, Case(d, c, CHECKED).tensors(device, **sizes), c) for d in head_dims for c in (True, False))
        except (RuntimeError, ValueError) as error:
            said.append(f"{name} left out: {str(error).splitlines()[0]}")
            continue
        if found <= BOUND:
            good[name] = attention
        said.append(f"{name}: largest error {found:.1e}" + ("" if found <= BOUND else f", above {BOUND:.0e}: not timed"))
    return good, said


def page(args: argparse.Namespace) -> str:
    """Everything measured, as Markdown."""
    contenders, said = served("cuda", args.head_dim, tokens=CHECKED)
    heads = " | ".join(CONTENDERS)
    lines = [
        f"# Attention on {torch.cuda.get_device_name()}",
        "",
        f"torch {torch.__version__}, bf16, {TOKENS:,} tokens, heads x head dim {HIDDEN:,}, {args.rounds} rounds,",
        f"{time.strftime('%Y-%m-%d')}.",
        "TFLOP/s forward / backward; the backward pass counts 2.5 times the FLOP of the forward pass, a causal mask half.",
        f"Against the formula at S = {CHECKED}: " + "; ".join(said) + ".",
        "",
        f"    python bench/attention.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"| d | mask | S | {heads} | fast / best other |",
        "|--:|---|--:" + "|--:" * (len(CONTENDERS) + 1) + "|",
    ]
    for case in (Case(d, causal, seq) for d in args.head_dim for causal in (True, False) for seq in args.seq):
        tensors = case.tensors("cuda")
        lines.append(row(case, case.flop(tensors[0]), measure(contenders, case, tensors, rounds=args.rounds, clock=cuda_clock)))
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def numbers(text: str) -> list[int]:
    """1024,2048 -> [1024, 2048]"""
    return [int(word) for word in text.split(",")]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=numbers, default=[1024 << power for power in range(6)])
    parser.add_argument("--head-dim", type=numbers, default=[64, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/attention.py needs a CUDA GPU, and torch finds none; nothing was measured")
    name = torch.cuda.get_device_name().replace(" ", "-")
    out = args.out or Path(__file__).parent / f"results/attention-{name}.md"
    out.write_text(page(args))
    print(out)


if __name__ == "__main__":
    main()
