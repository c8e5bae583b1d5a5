"""Documents as separate SDPA calls against one S x S mask: time and peak memory on the CPU, forward and backward.

    python bench/attention_documents.py [--seq 4096] [--documents 16] [--threads 2]

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


def one_mask(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask) -> Tensor:
    """SDPA with the S x S mask written out."""
    seen = visible(mask, rows=len(q), queries=range(q.shape[2]), keys=range(k.shape[2]), device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


METHODS = {"separate calls (sdpa)": attention_sdpa, "one S x S mask in SDPA": one_mask, "reference": attention_reference}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds and peak bytes of one method in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = ((args.heads, args.seq), (args.heads // 2, args.seq), (args.heads // 2, args.seq))
    q, k, v = (torch.randn(1, heads, seq, 64, requires_grad=True) for heads, seq in sizes)
    mask = Mask(documents=((args.seq // args.documents,) * args.documents,))
    device = select("cpu")
    device.reset_peak_memory()
    before, seconds = device.memory().allocated, []
    for _ in range(3):
        start = time.perf_counter()
        METHODS[args.method](q, k, v, mask=mask).sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak": device.memory().peak - before}


def main() -> None:
    """Print the table, or with --method measure it here and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seq", 4096), ("documents", 16), ("heads", 8), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args)))
        return
    print("| S | documents | method | seconds | peak memory, MiB |\n|--:|--:|---|--:|--:|")
    for method in METHODS:
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--method", method], capture_output=True, text=True, check=True)
        got = json.loads(run.stdout)
        print(f"| {args.seq} | {args.documents} | {method} | {got['seconds']:.3f} | {got['peak'] / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
