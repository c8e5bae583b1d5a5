"""The best mesh of a run: every mesh that fits is priced in closed form, the best are run event by event."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.layout.stages import split_layers
from llmtrain.simulate.case import Case
from llmtrain.simulate.engines import ZERO, fits, habits_of, sharings
from llmtrain.simulate.events import replay
from llmtrain.simulate.habits import Habits
from llmtrain.simulate.memory import peak
from llmtrain.simulate.of_config import DTYPES, longest
from llmtrain.simulate.rates import Rates
from llmtrain.simulate.step import price

BEST = 50
"""Candidates that are run event by event."""
RESERVE = 0.92
"""Share of a device's memory that a plan may fill."""
NATIVE = Habits().name
MICRO_BATCHES, VIRTUAL = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Found:
    """A mesh, and what it costs."""

    case: Case
    seconds: float
    memory: float

    @property
    def mesh(self) -> str:
        """Its axes and choices in words."""
        case = self.case
        axes = (("tp", case.tp), ("pp", case.pp), ("vpp", case.virtual), ("cp", case.cp), ("ep", case.ep), ("dp", case.dp))
        more = [f"dispatch within {case.hierarchical}"] * (case.hierarchical > 1) + ["overlap"] * case.overlap_micro_batches
        again = "+".join(sorted(case.recompute)) or "none"
        other = f"{case.habits.name} {case.shard if case.dp > 1 else ''}".rstrip() + ": " if case.habits.name != NATIVE else ""
        return (
            other
            + " ".join(f"{name} {size}" for name, size in axes if size > 1)
            + f", micro-batch {case.micro_batch}, recompute {again}"
            + "".join(f", {one}" for one in more)
        )


@dataclass(frozen=True)
class Result:
    """What a search has seen."""

    tried: int
    fitting: int
    best: tuple[Found, ...]
    """By the event simulation, the fastest first."""
    pareto: tuple[Found, ...]
    """Of all that fit, those that nothing beats in both time and memory; the fastest first."""
    disagreement: float
    """Largest difference between closed form and events among the best."""


def search(
    cfg: RunConfig, hardware: Hardware, devices: int, rates: Rates, *, engines: Sequence[str] = ("native",), limit: int | None = None
) -> Result:
    """The fastest meshes for the model, batch and sequence length of `cfg`; what it says of its own mesh and engine does not count.

    Raises UserError where nothing fits.
    """
    tried, fitting, known = 0, [], {}
    for case in candidates(cfg, hardware, devices, engines):
        tried += 1
        held = peak(case)
        if held <= RESERVE * hardware.memory.value:
            fitting.append(Found(case, price(case, rates, known).seconds, held))
        if limit and tried >= limit:
            break
    if not fitting:
        raise UserError(f"of {tried:,} meshes of {devices:,} x {hardware.key} none has room for this model; use more devices")
    fitting.sort(key=lambda found: found.seconds)
    best, apart = [], 0.0
    for found in fitting[:BEST]:
        seconds = replay(found.case, rates).step.seconds
        apart = max(apart, abs(found.seconds / seconds - 1))
        best.append(Found(found.case, seconds, found.memory))
    best.sort(key=lambda found: found.seconds)
    return Result(tried, len(fitting), tuple(best), tuple(_pareto(fitting)), apart)


def _pareto(found: Sequence[Found]) -> Iterator[Found]:
    """`found` is sorted by time."""
    least = float("inf")
    for one in found:
        if one.memory < least:
            least = one.memory
            yield one


def candidates(cfg: RunConfig, hardware: Hardware, devices: int, engines: Sequence[str] = ("native",)) -> Iterator[Case]:
    """Every mesh and engine worth a look, for the stretch of steps in which most tokens of the run pass."""
    model, segment = cfg.model, longest(cfg)
    batch, seq_len = segment.batch, segment.phase.seq_len
    base = Case(model=model, hardware=hardware, seq_len=seq_len, dtype=DTYPES[cfg.precision.compute])
    habits = {(engine, piped): habits_of(cfg, hardware, pipeline=piped, engine=engine) for engine in engines for piped in (False, True)}
    for tp, cp, pp in product(_widths(model, hardware), _contexts(seq_len), _divisors(devices)):
        ranks = devices // (tp * cp * pp)
        if devices % (tp * cp * pp) or pp > model.layers:
            continue
        for micro, virtual in product(MICRO_BATCHES, VIRTUAL if pp > 1 else (1,)):
            micros = batch // (ranks * micro)
            if batch % (ranks * micro) or (pp > 1 and micros < pp) or pp * virtual > model.layers:
                continue
            layers = _layers(model, pp * virtual, pp, seq_len) if pp > 1 else None
            experts = _experts(model, ranks * cp, tp, hardware.devices_per_node)
            for (ep, etp, inner), again, pairs in product(experts, _recomputations(model), _overlaps(model, virtual)):
                if pairs and ep == 1:
                    continue
                shared = ranks * cp > 1 or (ep * etp > 1 and ranks * cp * tp // (ep * etp) > 1)
                case = base.with_(
                    micro_batch=micro, micros=micros, tp=tp, pp=pp, virtual=virtual, cp=cp, ep=ep, etp=etp, dp=ranks, layers=layers,
                    hierarchical=inner, overlap_micro_batches=pairs, recompute=again, shard="zero3" if shared else "none",
                    habits=habits[engines[0], pp > 1],
                )  # fmt: skip
                for engine in engines:
                    if fits(engine, case, model):
                        yield from _shared(engine, case, habits[engine, pp > 1])


def _shared(engine: str, case: Case, habits: Habits) -> Iterator[Case]:
    for shard in sharings(engine, case):
        same = habits is case.habits and shard == case.shard
        yield case if same else case.with_(habits=habits, shard=shard)


_SPLITS: dict[tuple[int, int, int, int], tuple[ModelConfig, tuple[int, ...]]] = {}


def _layers(model: ModelConfig, stages: int, ranks: int, seq_len: int) -> tuple[int, ...]:
    key = (id(model), stages, ranks, seq_len)
    if key not in _SPLITS:
        _SPLITS[key] = model, split_layers(model, stages, seq_len=seq_len, ranks=ranks)
    return _SPLITS[key][1]


def _widths(model: ModelConfig, hardware: Hardware) -> list[int]:
    return [tp for tp in (1, 2, 4, 8, 16) if model.attention.heads % tp == 0 and tp <= hardware.devices_per_node]


def _contexts(seq_len: int) -> list[int]:
    """Sequences are shared from 16K tokens on."""
    return [cp for cp in (1, 2, 4, 8, 16) if cp == 1 or seq_len // cp >= 8192]


@lru_cache(maxsize=64)
def _divisors(number: int) -> list[int]:
    return [one for one in range(1, min(number, 128) + 1) if number % one == 0]


def _experts(model: ModelConfig, sharing: int, tp: int, node: int) -> list[tuple[int, int, int]]:
    """(ep, etp, ranks of ep in a node): whole experts over all ranks of a stage, or each shared by tp; over several nodes also with
    dispatch once to each."""
    if model.ffn.kind != "moe":
        return [(1, 1, 1)]
    found = [(ep, 1) for ep in _powers(gcd(model.ffn.experts, sharing * tp))]
    found += [(ep, tp) for ep in _powers(gcd(model.ffn.experts, sharing))] if tp > 1 else []
    several = [(ep, etp, node // etp) for ep, etp in found if 1 < node // etp < ep and ep % (node // etp) == 0]
    return [(ep, etp, 1) for ep, etp in found] + several


def _overlaps(model: ModelConfig, virtual: int) -> tuple[bool, ...]:
    """Micro-batches overlap in the pairs of an interleaved schedule, where there is a dispatch to hide."""
    return (False, True) if model.ffn.kind == "moe" and virtual > 1 else (False,)


def _powers(number: int) -> list[int]:
    return [one for one in (1, 2, 4, 8, 16, 32, 64, 128, 256) if number % one == 0]


def _recomputations(model: ModelConfig) -> list[frozenset[str]]:
    modules = {"norms", "activation"} | ({"mla_up"} if model.attention.kind == "mla" else set())
    return [frozenset(), frozenset(modules), frozenset({"full"})]


def applied(cfg: RunConfig, case: Case) -> dict:
    """The changes that make `cfg` run as `case`, as a nested dict of options."""
    again = sorted(case.recompute) if case.recompute - {"full"} else "full" if case.recompute else "none"
    parallel = {"tp": case.tp, "pp": case.pp, "virtual_stages": case.virtual, "cp": case.cp, "ep": case.ep, "etp": case.etp}
    nodes = (
        {"ep_kind": "hierarchical", "ep_inner": case.hierarchical} if case.hierarchical > 1 else {"ep_kind": "all_to_all", "ep_inner": None}
    )
    parallel |= nodes | {"overlap_micro_batches": case.overlap_micro_batches}
    parallel |= {"dp_shard": case.dp, "dp_replicate": 1, "layers_per_stage": None, "schedule": "auto"}
    found = {"parallel": parallel, "train": {"micro_batch": case.micro_batch, "recompute": again}}
    if (name := case.habits.name) == NATIVE:
        return found | {"engine": {"kind": "native"}}
    return found | {"engine": {"kind": name} | ({"zero": ZERO.index(case.shard)} if name == "deepspeed" else {})}
