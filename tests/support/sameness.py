"""One short training run of a tiny model in this world, as numbers to compare: losses and gradient norms of 20 steps, every full gradient
and routing decision of step 1."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from engine_gradients import gradients
from routing import Routing

from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.device import select
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine import deepspeed, native  # noqa: F401 - they register themselves
from llmtrain.engine.base import ENGINES
from llmtrain.layout.steps import StepPlan
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import Call, resolve
from llmtrain.parallel import cp_ring, ep_rows
from llmtrain.parallel import mesh as world
from llmtrain.tools.selftest.parity_run import nudge_weights
from llmtrain.train.stream import micro_batches

MODEL = {
    "vocab_size": 61,
    "layers": 3,
    "hidden": 32,
    "attention": {"heads": 4, "kv_heads": 2, "qk_norm": True},
    "ffn": {"hidden": 48},
    "norm": {"placement": "depth_scaled_sandwich"},
    "init": {"kind": "normal", "std": 0.1},
}
BASE = {"model": MODEL, "train": {"steps": 20, "seq_len": 24, "global_batch": 8, "micro_batch": 2, "loss_chunk": 16}, "optim": {"lr": 0.01}}


class Documents:
    """Samples of 24 tokens cut in random documents, or `whole`; the later a sample, the more of its targets are masked away."""

    seq_len = 24

    def __init__(self, order: Callable[[int], int] | None = None, *, whole: bool = False):
        self.order, self.whole = order or (lambda sample: sample), whole

    def __len__(self):
        return 1 << 20

    def batch(self, first: int, count: int) -> Batch:
        rows = [self._row(self.order(sample)) for sample in range(first, first + count)]
        tokens, targets, positions, documents = zip(*rows)
        stack = [torch.from_numpy(np.stack(part)) for part in (tokens, targets, positions)]
        return Batch(*stack, documents=documents, samples=tuple(range(first, first + count)))

    def _row(self, sample: int):
        rng = np.random.default_rng(sample)
        cuts = np.unique(rng.integers(1, self.seq_len, size=rng.integers(0, 5)))
        lengths = np.diff([0, *([] if self.whole else cuts), self.seq_len])
        tokens = rng.integers(0, 61, size=self.seq_len + 1)
        targets = tokens[1:].copy()
        targets[np.cumsum(lengths) - 1] = NO_TARGET
        targets[: (sample % 8) * 2] = NO_TARGET
        positions = np.concatenate([np.arange(n) for n in lengths])
        return tokens[:-1], targets, positions, tuple(int(n) for n in lengths)


def of_conversations(cfg: RunConfig, *, tokenizer: str, cache: str, **options):
    """A dataset of rows of packed conversations, every third of which is left without any target."""
    from llmtrain.config.data import ConversationSource, TokenizerConfig
    from llmtrain.data.dataset import build_dataset

    source = ConversationSource(template="plain", **options)
    samples = StepPlan.from_config(cfg).phases[0].samples
    return Emptied(build_dataset([source], seq_len=24, samples=samples, seed=1, cache=cache, tokenizer=TokenizerConfig(path=tokenizer)))


class Emptied:
    """A dataset every third of whose samples has no target."""

    def __init__(self, dataset):
        self.dataset = dataset

    def batch(self, first: int, count: int) -> Batch:
        batch = self.dataset.batch(first, count)
        for row, sample in enumerate(batch.samples):
            if sample % 3 == 1:
                batch.targets[row] = NO_TARGET
        return batch


def permuted(sample: int) -> int:
    """Another order of the 8 samples inside each step."""
    return sample // 8 * 8 + (sample * 5 + 3) % 8


def merge(base: dict, changes: dict) -> dict:
    """Nested dicts merged, `changes` winning; another `kind` starts afresh."""

    def one(key: str, value):
        under = base.get(key)
        if not isinstance(value, dict) or under is None or value.get("kind", under.get("kind")) != under.get("kind"):
            return value
        return merge(under, value)

    return base | {key: one(key, value) for key, value in changes.items()}


@contextmanager
def broken_count(engine) -> Iterator[None]:
    """Each rank divides by its own target count, as a mean over ranks of local means does."""
    engine._count_targets = lambda batches: sum(batch.target_count for batch in batches) * engine.mesh.world
    yield


@contextmanager
def broken_sync(engine) -> Iterator[None]:
    """Gradients of all micro-batches but the last stay on their rank."""
    for parameter in engine.parameters.values():
        parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
    yield


@contextmanager
def no_tp_sum(engine) -> Iterator[None]:
    """Gradients of what is not split stay each rank's partial sums."""
    engine.stages.partial.clear()
    yield


@contextmanager
def no_copy_sum(engine) -> Iterator[None]:
    """Both copies of a tied embedding keep their own gradients."""
    if engine.stages.embedding_copy is not None:
        engine.stages.embedding_copy.sum_gradients = lambda local: None
    yield


@contextmanager
def replaced(module, name: str, value) -> Iterator[None]:
    """`module.name` is `value` for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def no_merge(engine):
    """Blocks of a ring are added up without weighing them by their log-sum-exps."""

    def add(out, lse, part, part_lse):
        out.add_(part)
        lse.copy_(torch.logaddexp(lse, part_lse))

    return replaced(cp_ring, "_merge", add)


def no_order(engine):
    """Results return from the experts in the experts' order, not in the one in which their tokens came."""
    return replaced(ep_rows, "inverse", lambda order: torch.arange(len(order)))


def no_sharing(engine):
    """The norm counts a gradient once for every rank that holds it."""
    return replaced(native, "holders", lambda parameter, ranks: 1)


FAULTS = {
    "count": broken_count,
    "sync": broken_sync,
    "tp sum": no_tp_sum,
    "embedding copy": no_copy_sum,
    "cp merge": no_merge,
    "expert order": no_order,
    "holders": no_sharing,
}


def train(
    changes: dict,
    *,
    permute: bool = False,
    whole: bool = False,
    nudged: int | None = None,
    fault: str | None = None,
    stop: int | None = None,
    device: str = "cpu",
    conversations: dict | None = None,
) -> dict:
    """On this world's mesh: losses, norms of gradients and metrics of every step, or the first `stop`; and of step 1 gradients (whole, by
    name), expert ids by layer, and how often each expert was chosen.

    permute: the samples of each step in another order. nudged: seed by which one process's initial weights are moved by a unit of rounding.
    device: the kind of this rank's device. conversations: options of such a source, `tokenizer` and `cache`, which are read instead.
    """
    torch.set_num_threads(1)
    cfg = RunConfig.model_validate(merge(BASE, changes))
    engine = build_engine(cfg, device)
    if nudged is not None:
        nudge_weights(engine, nudged)
    plan, mesh = StepPlan.from_config(cfg), engine.mesh
    data = of_conversations(cfg, **conversations) if conversations else Documents(permuted if permute else None, whole=whole)
    losses, norms, metrics, found = [], [], [], {}
    with FAULTS[fault](engine) if fault else nullcontext():
        for index in range(stop or plan.steps):
            step = plan.step(index)
            batches = micro_batches(step, data, rank=mesh.data_rank, ranks=mesh.shape.dp)
            with Routing(engine) if index == 0 else nullcontext() as routing:
                result = engine.forward_backward(batches)
            if index == 0:
                choices = None if result.expert_counts is None else result.expert_counts.tolist()
                found = first_step(engine, batches) | {"routing": routing.gathered(), "choices": choices}
            norms.append(engine.grad_norm())
            engine.apply(lr=step.lr)
            losses.append(result.loss)
            metrics.append(result.metrics)
    mesh.leave()
    return {"losses": losses, "norms": norms, "metrics": metrics} | found


def build_engine(cfg: RunConfig, kind: str = "cpu"):
    """The engine of `cfg` in this world, on devices of this kind."""
    device = select(kind, int(os.environ.get("LOCAL_RANK", 0)))
    device.set_current()
    mesh = world.start(cfg.parallel, device=device)
    call = Call(device=kind, dtype=torch_dtype(cfg.precision.compute), documents=True, head_dim=8, heads=4, kv_heads=2)
    return ENGINES[cfg.engine.kind](cfg, objective=cross_entropy, mesh=mesh, device=device, ops=resolve(cfg.kernels, call))


def first_step(engine, batches: list[Batch]) -> dict:
    """Gradients from all ranks, and every rank's target counts."""
    everyone = {name: value for part in engine.mesh.gather(gradients(engine)) for name, value in part.items()}
    return {"gradients": everyone, "counts": engine.mesh.gather([batch.target_count for batch in batches])}


def train_all(scenarios: dict[str, dict], done: str | None = None) -> dict[str, dict]:
    """Several runs in one world, by name; each is also left in the folder `done` as soon as it has ended, as (name, run)."""
    runs = {}
    for index, (name, scenario) in enumerate(scenarios.items()):
        runs[name] = train(**scenario)
        if done is not None and torch.distributed.get_rank() == 0:
            partial = Path(done) / f"{index}.partial"
            partial.write_bytes(pickle.dumps((name, runs[name])))
            partial.rename(partial.with_suffix(".pkl"))
    return runs


def loss_difference(a: dict, b: dict) -> float:
    """Largest relative difference of any step's loss; `b` may have gone on for longer."""
    return _difference(a["losses"], b["losses"])


def norm_difference(a: dict, b: dict) -> float:
    """Largest relative difference of any step's gradient norm, by which gradients are clipped; `b` as above."""
    return _difference(a["norms"], b["norms"])


def _difference(a: list[float], b: list[float]) -> float:
    assert 0 < len(a) <= len(b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def gradient_difference(a: dict, b: dict) -> float:
    """Largest difference of any gradient of step 1, relative to that gradient's norm.

    A gradient below a millionth of the largest is one that is zero but for rounding (that of a key bias, without rotation): it is compared
    with that millionth.
    """
    assert a["gradients"].keys() == b["gradients"].keys()
    norms = {name: float(np.linalg.norm(gradient)) for name, gradient in b["gradients"].items()}
    least = 1e-6 * max(norms.values())
    return max(float(np.linalg.norm(a["gradients"][n] - g)) / max(norms[n], least) for n, g in b["gradients"].items())


def routing_difference(a: dict, b: dict) -> tuple[int, int]:
    """How many tokens of step 1 went to other experts in some layer, or to none, and how many (token, layer) there are."""
    assert a["routing"].keys() == b["routing"].keys()
    pairs = [(a["routing"][layer], there) for layer, there in b["routing"].items()]
    return sum(sum(here.get(token) != ids for token, ids in there.items()) + len(here.keys() - there) for here, there in pairs), sum(
        len(there) for _, there in pairs
    )
