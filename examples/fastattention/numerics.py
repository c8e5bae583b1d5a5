"""Every attention that this Python can run, forward and gradients, against the formula in float64; prints JSON.

Run by run.py in a process of its own, maybe with the Python of another environment: Triton decides at its import whether it is
interpreted.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/kernels/support"))
os.environ |= {"TRITON_INTERPRET": "1", "LLMTRAIN_VOLTA_CHECK": "1"}

import torch
from attention_call import AttentionCall
from attention_harness import BOUNDS, check, check_mask
from llmtrain_kernels import Mask
from llmtrain_kernels.volta import shim

from llmtrain.ops import Call, implementations
from llmtrain.ops.registry import Implementation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROUPED = {"heads": 4, "kv_heads": 2}


def cases(seed: int) -> dict[str, AttentionCall]:
    """Calls over the support matrix; numbers are drawn from `seed`."""
    return {
        "causal": AttentionCall(Mask(), queries=130, keys=130, seed=seed),
        "full, 2 rows, 4 heads on 2": AttentionCall(Mask(causal=False), rows=2, queries=70, keys=70, d=128, dv=128, seed=seed, **GROUPED),
        "documents": AttentionCall(Mask(documents=((60, 70), (130,))), rows=2, queries=130, keys=130, d=96, dv=96, strided=True, seed=seed),
        "window 33": AttentionCall(Mask(window=33), queries=130, keys=130, d=128, dv=128, seed=seed),
        "after a cache": AttentionCall(Mask(), queries=40, keys=130, q_offset=90, seed=seed, **GROUPED),
        "latent, 192 and 128": AttentionCall(Mask(), heads=2, kv_heads=2, queries=70, keys=70, d=192, dv=128, seed=seed),
    }


def facts(call: AttentionCall, dtype: torch.dtype) -> Call:
    """What the registry is asked."""
    mask, sizes = call.mask, {"head_dim": call.d, "value_head_dim": call.dv, "heads": call.heads, "kv_heads": call.kv_heads}
    return Call("cpu", dtype, causal=mask.causal, documents=bool(mask.documents), window=mask.window, offsets=call.q_offset > 0, **sizes)


def rows(entry: Implementation, calls: dict[str, AttentionCall]) -> list[dict]:
    """Per dtype the worst errors of an implementation over the calls that it serves, or why it serves none."""
    found = []
    for name, dtype in DTYPES.items():
        refusals = {case: entry.refusal(facts(call, dtype)) for case, call in calls.items()}
        served = [case for case, reason in refusals.items() if reason is None]
        row = {"name": entry.name, "dtype": name, "served": len(served), "of": len(calls)}
        if served:
            errors = [check(entry.function, calls[case], dtype=dtype, bounds=float("inf")) for case in served]
            row["out"] = max(error["out"] for error in errors)
            row["gradients"] = max(error[part] for error in errors for part in ("dq", "dk", "dv"))
            row["bound"] = BOUNDS[dtype]
            row["wrong_bits"] = [text for case in served if (text := wrong_bits(entry, calls[case], dtype))]
        else:
            row["why"] = next(iter(refusals.values()))
        found.append(row)
    return found


def wrong_bits(entry: Implementation, call: AttentionCall, dtype: torch.dtype) -> str | None:
    """What is wrong with the mask, forward or backward."""
    try:
        check_mask(entry.function, call, dtype=dtype)
    except AssertionError as error:
        return str(error)
    return None


def main() -> None:
    """All implementations of attention that are for CPUs, or run on one to be checked."""
    seed, quick = int(sys.argv[1]), sys.argv[2] == "quick"
    calls = cases(seed)
    calls = {"causal": calls["causal"]} if quick else calls
    found = []
    with shim.watch() as launches:
        for entry in implementations("attention"):
            if "cpu" in entry.devices and not (quick and entry.name == "fast_volta_check"):
                print(f"{entry.name} against float64", file=sys.stderr, flush=True)
                found += rows(entry, calls)
    reports = [report for _, report in launches]
    accesses, conflicts = sum(r.loads + r.stores for r in reports), sum(r.conflicts for r in reports)
    print(json.dumps({"rows": found, "launches": len(reports), "accesses": accesses, "conflicts": conflicts}))


if __name__ == "__main__":
    main()
