"""Which meshes a self-test compares with one process on the CPU, and when they count as the same: the bounds of docs/parity.md."""

from dataclasses import dataclass, field

import numpy as np

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.tools.selftest.work import Job, Result

LOSS, GRADIENT, FACTOR = 1e-10, 1e-9, 5.0
"""Relative, in float64; and how many times the spread of one process in float32 a mesh may differ."""
STEPS, NUDGES = 8, (1, 2, 3)
OTHER = {"cuda": {"tp_kind": "symm_mem"}, "npu": {"tp_kind": "chunked"}}
"""What a device can do besides what `auto` takes."""
MOE = {"kind": "moe", "top_k": 2, "hidden": 16}


@dataclass(frozen=True)
class Row:
    """A mesh and a model: dense, or a mixture of experts."""

    parallel: dict = field(default_factory=dict)
    moe: bool = False

    @property
    def name(self) -> str:
        """`tp 2`, or `dp_shard 2 x ep 2, MoE`."""
        words = " x ".join(f"{axis} {n}" for axis, n in self.parallel.items() if isinstance(n, int)) or "one rank"
        kinds = [kind for kind in self.parallel.values() if isinstance(kind, str)]
        return words + (f" ({', '.join(kinds)})" if kinds else "") + (", MoE" if self.moe else "")


def rows(ranks: int, device: str) -> list[Row]:
    """The rows that `ranks` ranks of `device` allow; on the CPU one rank is what the others are compared with."""
    alone = [] if device == "cpu" else [Row(), Row(moe=True)]
    if ranks == 1:
        return alone
    n, found = ranks, [Row({axis: ranks}) for axis in ("dp_shard", "dp_replicate", "tp", "pp")]
    found += [Row({"cp": n, "cp_kind": kind}) for kind in ("all_gather", "ring", "ulysses")]
    found += [Row({"dp_shard": n, "ep": n}, moe=True), Row({"tp": n, "ep": n}, moe=True)]
    if device in OTHER:
        found.append(Row({"tp": n, **OTHER[device]}))
    if n % 2 == 0 and n > 2:
        half = n // 2
        found += [Row({"dp_shard": half, "tp": 2}), Row({"pp": 2, "dp_shard": half}), Row({"pp": 2, "tp": half})]
        found += [Row({"dp_replicate": 2, "dp_shard": half}), Row({"cp": 2, "dp_shard": half}), Row({"dp_shard": n, "ep": 2}, moe=True)]
    return alone + found


def settings(row: Row, *, ranks: int, precision: str) -> dict:
    """The run of a row as nested options: a transformer with heads, layers, experts and rows for `ranks` ranks along any axis."""
    heads = ranks * max(1, 4 // ranks)
    ffn = {**MOE, "experts": ranks * max(1, 4 // ranks)} if row.moe else {"hidden": ranks * max(1, 48 // ranks)}
    model = {
        "vocab_size": 61 if ranks <= 8 else 8 * ranks - 3,
        "layers": max(3, ranks),
        "hidden": 8 * heads,
        "attention": {"heads": heads, "kv_heads": 2 if ranks & (ranks - 1) == 0 else heads, "qk_norm": True},
        "ffn": ffn,
        "norm": {"placement": "depth_scaled_sandwich"},
        "init": {"kind": "normal", "std": 0.1},
    }
    train = {
        "steps": STEPS,
        "seq_len": ranks * max(1, 24 // ranks),
        "global_batch": 2 * ranks * max(1, 4 // ranks),
        "micro_batch": 2,
        "loss_chunk": 16,
    }
    train["compile"] = "off"
    return {"model": model, "train": train, "optim": {"lr": 0.01}, "precision": precision, "parallel": row.parallel}


def refusal(row: Row, *, ranks: int, device: str) -> str | None:
    """Why this mesh cannot run at all, in the words of the check before every run, or None."""
    from llmtrain.parallel.check import check_parallel

    cfg = RunConfig.model_validate(settings(row, ranks=ranks, precision="fp32"))
    world = 1 if not row.parallel else ranks
    try:
        check_parallel(cfg, MeshShape.from_config(cfg.parallel, world=world), StepPlan.from_config(cfg), device=device)
    except UserError as error:
        return str(error)
    return None


def references(ranks: int, precisions: tuple[str, ...]) -> list[Job]:
    """One process on the CPU with the reference of every op: as it is, and in float32 also in another order and from nudged weights."""
    jobs = []
    for moe in (False, True):
        row = Row(moe=moe)
        for precision in precisions:
            told = settings(row, ranks=ranks, precision=precision)
            variants = (
                {"": {}} if precision == "fp64" else {"": {}, "order": {"permute": True}, **{f"nudge {n}": {"nudge": n} for n in NUDGES}}
            )
            for variant, more in variants.items():
                jobs.append(
                    Job(f"reference {model_name(moe)} {precision} {variant}".strip(), "parity", {"settings": told, "plain": True, **more})
                )
    return jobs


def jobs(wanted: list[Row], *, ranks: int, precisions: tuple[str, ...]) -> list[Job]:
    """The runs of the rows on the device, with the ops that `auto` takes."""
    return [
        Job(f"{row.name}, {precision}", "parity", {"settings": settings(row, ranks=ranks, precision=precision)})
        for row in wanted
        for precision in precisions
    ]


def model_name(moe: bool) -> str:
    """The name of the model in jobs."""
    return "MoE" if moe else "dense"


def verdict(row: Row, precision: str, results: dict[str, Result]) -> dict:
    """The line of a row: differences, bounds, and whether they are kept."""
    name = f"{row.name}, {precision}"
    line: dict = {"name": row.name, "precision": precision, "state": "failed"}
    reference = f"reference {model_name(row.moe)} {precision}"
    spread_names = [f"{reference} order", *(f"{reference} nudge {n}" for n in NUDGES)] if precision == "fp32" else []
    for job in (name, reference, *spread_names):
        if results[job].error is not None:
            return {**line, "error": f"{job}: {results[job].error}" if job != name else results[job].error}
    ours, alone = results[name], results[reference]
    line |= {"loss": loss_difference(ours, alone), "gradient": gradient_difference(ours, alone)}
    if precision == "fp64":
        line |= {"loss_bound": LOSS, "gradient_bound": GRADIENT}
    else:
        spread = [results[job] for job in spread_names]
        line["loss_bound"] = FACTOR * max(loss_difference(run, alone) for run in spread)
        line["gradient_bound"] = FACTOR * max(gradient_difference(run, alone) for run in spread)
    kept = line["loss"] <= line["loss_bound"] and line["gradient"] <= line["gradient_bound"]  # False for NaN too
    return {**line, "state": "passed" if kept else "failed"}


def loss_difference(a: Result, b: Result) -> float:
    """Largest relative difference of any step's loss; infinite where one is not a number."""
    pairs = list(zip(a.values["losses"], b.values["losses"], strict=True))
    worst = max(abs(x - y) / abs(y) for x, y in pairs)
    return worst if all(np.isfinite(x) for x, _ in pairs) else float("inf")


def gradient_difference(a: Result, b: Result) -> float:
    """Largest difference of any gradient of step 1, relative to its norm or to a millionth of the largest norm."""
    ours, theirs = np.load(a.arrays), np.load(b.arrays)
    if set(ours.files) != set(theirs.files):
        return float("inf")
    norms = {name: float(np.linalg.norm(theirs[name])) for name in theirs.files}
    least = 1e-6 * max(norms.values())
    differences = [float(np.linalg.norm(ours[name] - theirs[name])) / max(norms[name], least) for name in theirs.files]
    return max(differences) if np.isfinite(differences).all() else float("inf")
