"""Where the time of a step goes, by torch.profiler's self CPU time."""

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# Batched products are attention's: nothing else in these models has them.
KINDS = {
    "GEMM": (
        "aten::mm",
        "aten::addmm",
        "aten::_grouped_mm",
        "mkldnn",
        "mkl_linear",
        "onednn",
        "linear_pointwise",
        "packed_gemm",
    ),
    "attention": ("flash_attention", "bmm", "_Tiled"),
    "optimizer": ("fused_adam", "Optimizer"),
    "compiled": ("cpp_fused", "cpp_", "Compiled", "CompiledFunction"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_"),
}


def kind(name: str) -> str:
    """The kind of work behind an op's name; `other` for elementwise ops, reductions and bookkeeping."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile_step(step: Callable[[], object], *, rows: int) -> tuple[str, dict[str, float], float]:
    """Profile one `step`: a table of the `rows` costliest ops, the share of each kind of work, and the step's seconds."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shares: dict[str, float] = {}
    for event in events:
        shares[kind(event.key)] = shares.get(kind(event.key), 0.0) + event.self_cpu_time_total / total
    lines = [f"{'op':60s} {'calls':>6s} {'ms':>9s} {'share':>6s}"]
    for event in events[:rows]:
        lines.append(
            f"{event.key[:60]:60s} {event.count:6d} {event.self_cpu_time_total / 1e3:9.1f} {event.self_cpu_time_total / total:6.1%}"
        )
    return "\n".join(lines), shares, seconds
