"""Attention on the CPU, forward and backward: documents as separate calls against one S x S mask, tiled products against SDPA.

    python bench/attention_documents.py [--seq 4096] [--documents 16] [--dtype bfloat16] [--threads 2]

Each method runs in a process of its own; peak memory is the growth of the resident set's high-water mark. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.device import select
from llmtrain.ops import Mask
from llmtrain.ops.attention import attention_reference, visible
from llmtrain.ops.sdpa import attention_sdpa
from llmtrain.ops.tiled_attention import attention_tiled


def one_mask(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask) -> Tensor:
    """SDPA with the S x S mask written out."""
    seen = visible(mask, rows=len(q), queries=range(q.shape[2]), keys=range(k.shape[2]), device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


METHODS = {
    "tiled": attention_tiled,
    "separate calls (sdpa)": attention_sdpa,
    "one S x S mask in SDPA": one_mask,
    "reference": attention_reference,
}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds and peak bytes of one method in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = ((args.heads, args.seq), (args.heads // 2, args.seq), (args.heads // 2, args.seq))
    dtype = getattr(torch, args.dtype)
    q, k, v = (torch.randn(args.batch, heads, seq, 64, dtype=dtype, requires_grad=True) for heads, seq in sizes)
    mask = Mask(documents=((args.seq // args.documents,) * args.documents,) * args.batch)
    device = select("cpu")
    device.reset_peak_memory()
    before, seconds = device.memory().allocated, []
    for _ in range(5):
        start = time.perf_counter()
        METHODS[args.method](q, k, v, mask=mask).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak": device.memory().peak - before}


def main() -> None:
    """Print the table, or with --method measure it here and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("seq", 4096), ("documents", 16), ("heads", 8), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--method", choices=METHODS, help="this one alone, printed as JSON")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args)))
        return
    print("| B | S | documents | dtype | method | seconds | peak memory, MiB |\n|--:|--:|--:|---|---|--:|--:|")
    for method in METHODS:
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--method", method], capture_output=True, text=True, check=True)
        got = json.loads(run.stdout)
        shape = f"{args.batch} | {args.seq} | {args.documents} | {args.dtype}"
        print(f"| {shape} | {method} | {got['seconds']:.3f} | {got['peak'] / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
