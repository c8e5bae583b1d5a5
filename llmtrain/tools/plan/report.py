"""What `llmtrain plan` says of one run: whether it fits, how long a step takes, where the time goes and what binds."""

from collections.abc import Iterator

from llmtrain.simulate.binding import gains, sentence
from llmtrain.simulate.case import Case
from llmtrain.simulate.events import Simulated
from llmtrain.simulate.memory import Memory, memory
from llmtrain.simulate.published import model_flops_utilisation
from llmtrain.simulate.rates import Rates
from llmtrain.simulate.step import Step

GIB, WIDTH = 2**30, 44
NAMES = {
    "product": "matrix products",
    "grouped": "products of experts",
    "pass": "element-wise work",
    "host": "waiting for the host",
    "outside": "outside the model",
}


def lines(name: str, case: Case, rates: Rates, found: Simulated, *, mesh: str) -> Iterator[str]:
    """The report."""
    step, hardware = found.step, case.hardware
    yield f"plan of {name} on {case.devices:,} x {hardware.key}: {mesh}"
    tokens = case.tokens / step.seconds
    each = f"{tokens / case.devices:,.0f} on each device"
    yield f"  a step of {case.tokens:,} tokens in {case.micros} micro-batches: {_seconds(step.seconds)}, {tokens:,.0f} tokens/s, {each}"
    yield f"  {_utilisation(case, step)}"
    yield from _memory(case)
    yield "  where the time goes"
    yield from _bars(step)
    if case.pp > 1:
        yield f"  schedule {found.schedule.kind}: ranks wait {step.bubble:.1%} of the pipeline's time"
    full = max(one.total for one in memory(case)) / hardware.memory.value
    yield f"  {sentence(case, step, gains(case, rates, step), memory_share=full)}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def _utilisation(case: Case, step: Step) -> str:
    causal, whole = (model_flops_utilisation(case, step.seconds, causal=causal) for causal in (True, False))
    both = f"MFU {causal:.1%} by the keys that a token sees (causal), {whole:.1%} by all keys (PaLM, Megatron-LM)"
    return f"{both}; peak {case.peak / 1e12:,.4g} TFLOP/s in {case.wide}"


def _memory(case: Case) -> Iterator[str]:
    """Of the ranks along pp: the fullest, and a table if there are several."""
    ranks, room = memory(case), case.hardware.memory.value
    most = max(ranks, key=lambda one: one.total)
    verdict = "fits" if most.total <= room else "DOES NOT FIT"
    where = f" on pipeline rank {ranks.index(most)}" if case.pp > 1 else ""
    yield f"  memory {verdict}: {most.total / GIB:.1f} of {room / GIB:.1f} GiB{where}"
    names = [name for name in vars(most) if any(getattr(one, name) > 1e6 for one in ranks)]
    yield f"    {'':6}" + "".join(f"{name:>13}" for name in names) + f"{'total':>9}"
    for rank, one in _chosen(ranks):
        yield f"    {rank:6}" + "".join(f"{getattr(one, name) / GIB:>13.2f}" for name in names) + f"{one.total / GIB:>9.2f}"


def _chosen(ranks: list[Memory]) -> Iterator[tuple[str, Memory]]:
    """All ranks of a short pipeline, the first two and last two of a long one."""
    shown = range(len(ranks)) if len(ranks) <= 8 else (0, 1, len(ranks) - 2, len(ranks) - 1)
    for rank in shown:
        yield (f"pp {rank}" if len(ranks) > 1 else "GiB"), ranks[rank]


def _bars(step: Step) -> Iterator[str]:
    longest = max(step.parts.values())
    for name, value in sorted(step.parts.items(), key=lambda pair: -pair[1]):
        if value / step.seconds >= 0.001:
            bar = "█" * max(1, round(WIDTH * value / longest))
            yield f"    {NAMES.get(name, name):22}{value / step.seconds:>7.1%}{_seconds(value):>10}  {bar}"
