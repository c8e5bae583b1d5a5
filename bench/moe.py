"""A mixture-of-experts layer, forward and backward on the CPU, against the same layer in transformers (Qwen3-MoE) with each of its kinds.

    python bench/moe.py                                  # fp32 and bf16, 9 interleaved rounds -> bench/results/moe-cpu.md
    python bench/moe.py --dtype fp32 --rounds 3 --out -  # to the screen
    python bench/moe.py --profile --dtype bf16           # where our time goes

Same weights, same tokens; outputs and gradients of the input are compared. No optimizer, one process. The order of the contenders rotates
from round to round. The floor is the time of dense products of as many FLOPs as the experts that are asked for need.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.model.moe import MoE
from llmtrain.ops import Call, resolve

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("eager", "batched_mm", "grouped_mm")


def ours(args: argparse.Namespace, dtype: torch.dtype, kernel: str = "auto") -> MoE:
    """Our layer, with random weights."""
    ffn = {"kind": "moe", "experts": args.experts, "top_k": args.top_k, "hidden": args.hidden}
    call = Call(device="cpu", dtype=dtype, expert_widths=(args.width, args.hidden))
    layer = MoE(ModelConfig(hidden=args.width, ffn=ffn), ops=resolve({"grouped_mm": kernel}, call)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return layer


def theirs(args: argparse.Namespace, dtype: torch.dtype, kind: str, layer: MoE):
    """Their layer with the weights of ours."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=args.width,
        moe_intermediate_size=args.hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        experts_implementation=kind,
    )
    config._experts_implementation = kind
    module = Qwen3MoeSparseMoeBlock(config).to(dtype)
    with torch.no_grad():
        module.gate.weight.copy_(layer.router.weight)
        module.experts.gate_up_proj.copy_(torch.cat((layer.experts.gate_proj, layer.experts.up_proj), 2).transpose(1, 2))
        module.experts.down_proj.copy_(layer.experts.down_proj.transpose(1, 2))
    return module


def step(layer: torch.nn.Module, x: torch.Tensor, weigh: torch.Tensor) -> torch.Tensor:
    """One forward and backward pass; gradients are left in x and the parameters."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    out = layer(x)
    out.backward(weigh)
    return out


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def floor(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[], object]:
    """The FLOPs of the experts, forward and backward, as three dense products of the best shape: rows as many as all experts' together."""
    rows = args.tokens * args.top_k
    x, weight = torch.randn(rows, args.width).to(dtype), torch.randn(args.width, 3 * args.hidden).to(dtype)
    y = torch.randn(rows, 3 * args.hidden).to(dtype)

    def products() -> None:
        x @ weight
        y @ weight.T
        x.T @ y

    return products


def check(contenders: dict[str, torch.nn.Module], x: torch.Tensor, weigh: torch.Tensor, tolerance: float) -> None:
    """Every contender computes the same."""
    reference = None
    for name, layer in contenders.items():
        found = [step(layer, x, weigh).detach().clone(), x.grad.clone()]
        reference = reference or found
        for mine, expected in zip(found, reference):
            off = float((mine.double() - expected.double()).norm() / expected.double().norm())
            if off > tolerance:
                raise SystemExit(f"{name} differs from {next(iter(contenders))} by {off:.1e}")


def race(args: argparse.Namespace, name: str) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    dtype = DTYPES[name]
    layer = ours(args, dtype)
    kinds = [kind for kind in args.kinds.split(",") if kind]
    contenders: dict[str, torch.nn.Module] = {"llmtrain": layer}
    contenders |= {f"transformers {kind}": theirs(args, dtype, kind, layer) for kind in kinds}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, args.tokens, args.width, generator=generator).to(dtype).requires_grad_()
    weigh = torch.randn(1, args.tokens, args.width, generator=generator).to(dtype)
    check(contenders, x, weigh, 1e-5 if name == "fp32" else 0.1)
    calls = {who: (lambda module=module: step(module, x, weigh)) for who, module in contenders.items()}
    calls["floor"] = floor(args, dtype)
    found: dict[str, list[float]] = {who: [] for who in calls}
    order = list(calls)
    for done in range(args.rounds):
        for who in order[done % len(order) :] + order[: done % len(order)]:
            found[who].append(seconds(calls[who]))
        print(f"{name} round {done + 1}/{args.rounds}: " + ", ".join(f"{w} {t[-1]:.3f} s" for w, t in found.items()), file=sys.stderr)
    return found


def table(args: argparse.Namespace, results: dict[str, dict[str, list[float]]]) -> str:
    """The results as Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python bench/moe.py", *sys.argv[1:]])
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "?"
    lines = [
        "# A mixture-of-experts layer on the CPU",
        "",
        f"`{command}`, {date.today()}, commit {commit}. {platform.processor() or platform.machine()}, {args.threads} threads, "
        f"torch {torch.__version__}, load {load} at the end.",
        "",
        f"{args.tokens:,} tokens of width {args.width}, {args.experts} experts of width {args.hidden} (SwiGLU), {args.top_k} of a token. "
        f"Forward and backward, gradients of input and weights; median of {args.rounds} interleaved rounds, and of the "
        "ratios of each. The floor is a dense product of as many FLOPs as the experts need.",
        "",
        "| dtype | layer | ms | its time over ours (min-max) | share of the floor |",
        "|---|---|--:|--:|--:|",
    ]
    for name, found in results.items():
        base = statistics.median(found["floor"])
        for who, times in found.items():
            ratios = [t / mine for t, mine in zip(times, found["llmtrain"])]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            share = base / statistics.median(times)
            lines.append(f"| {name} | {who} | {statistics.median(times) * 1e3:.0f} | {spread} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def profile(args: argparse.Namespace, name: str) -> None:
    """Print where our time goes."""
    layer = ours(args, DTYPES[name])
    x = torch.randn(1, args.tokens, args.width).to(DTYPES[name]).requires_grad_()
    weigh = torch.randn_like(x)
    step(layer, x, weigh)
    with torch.profiler.profile() as found:
        step(layer, x, weigh)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32,bf16", help="fp32,bf16")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of transformers")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rows", type=int, default=20, help="of the profile")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "moe-cpu.md"), help="- is the screen")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        for name in args.dtype.split(","):
            profile(args, name)
        return
    text = table(args, {name: race(args, name) for name in args.dtype.split(",")})
    print(text)
    if args.out != "-":
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
