"""Models and ops over ranks of tp against one process: every rank draws the same whole tensors and compares its part."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.train import PrecisionConfig
from llmtrain.convert.placed import held
from llmtrain.device.dtypes import torch_dtype
from llmtrain.model import build, initialise
from llmtrain.model.transformer import cut
from llmtrain.ops import Call, Mask, resolve
from llmtrain.parallel.cast import apply_cast
from llmtrain.parallel.fsdp import apply_fsdp, local_tensor
from llmtrain.parallel.ops import implementations, pending
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.parallel.tp import apply_tp

SMALL = {
    "vocab_size": 61,
    "layers": 2,
    "hidden": 32,
    "max_seq_len": 48,
    "attention": {"heads": 4, "kv_heads": 4},
    "ffn": {"hidden": 40},
    "init": {"std": 0.2},
}


def start() -> DeviceMesh:
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def in_world(jobs: dict[str, dict[str, dict]]) -> dict[str, dict[str, object]]:
    """Cases by function of this module and name, all in one world."""
    mesh = start()
    results = {function: {name: globals()[function](mesh, **case) for name, case in cases.items()} for function, cases in jobs.items()}
    dist.barrier()  # gloo's threads are done with the tensors of this interpreter before it ends
    dist.destroy_process_group()
    return results


def worst(value: float) -> float:
    """The largest of the ranks' values; nan counts as infinite."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(float("inf") if v != v else v for v in values)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference as a share of b's largest number, or of 1e-3: what is zero but for rounding has no share."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)).item()


def make_model(
    changes: dict,
    *,
    mesh: DeviceMesh | None = None,
    chunks: int = 1,
    dtype: torch.dtype = torch.float64,
    loss_chunk: int = 5,
    blocks: range | None = None,
    then: Callable | None = None,
):
    """A model, or the pipeline stage with `blocks` of a model of two, filled from one seed; shared over `mesh` if given, then `then`.

    Vectors are away from their trivial 0 and 1.
    """
    cfg = ModelConfig.model_validate(SMALL | changes)
    call = Call(device="cpu", dtype=dtype, documents=True, head_dim=cfg.head_dim, heads=cfg.attention.heads, kv_heads=cfg.kv_heads)
    with torch.device("meta"):
        model = build(cfg, resolve({}, call), loss_chunk).to(dtype)
    if blocks is not None:
        cut(model, blocks=blocks, first=blocks.start == 0, last=blocks.stop == cfg.layers)
    names = [name for name, _ in model.named_parameters()]
    if mesh is not None:
        apply_tp(model, mesh, chunks=chunks)
    if then is not None:
        then(model)
    assert names == [name for name, _ in model.named_parameters()]
    model = model.to_empty(device="cpu")
    initialise(model, cfg, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                extra = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
                local_tensor(parameter).add_(part(extra, parameter).to(dtype))
    return cfg, model


def part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, split as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    places = held(like)
    for dim, place in enumerate(places):
        whole = whole.index_select(dim, torch.tensor(list(place), dtype=torch.int64))
    return whole


def draw(batch: int, length: int, vocab: int = 61, seed: int = 0):
    """Tokens, targets with gaps, and positions of two documents per row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (batch, length), generator=generator)
    targets = torch.randint(0, vocab, (batch, length), generator=generator)
    targets[:, 3:7] = -100
    cut = length // 3
    positions = torch.cat((torch.arange(cut), torch.arange(length - cut)))[None].expand(batch, -1)
    return tokens, targets, positions, Mask(documents=((cut, length - cut),) * batch)


def one_step(model, batch: int, length: int, **extra) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, local gradients by name, and logits."""
    tokens, targets, positions, mask = draw(batch, length)
    loss = model(tokens, positions=positions, mask=mask, targets=targets, **extra)
    total = loss["ce_sum"] + loss.get("mtp_weight", 0.0) * loss.get("mtp_ce_sum", 0.0)
    (total / 17).backward()
    with torch.no_grad():
        logits = model(tokens, positions=positions, mask=mask)["logits"]
    return total.item(), {name: p.grad for name, p in model.named_parameters()}, logits


def compare(
    mesh: DeviceMesh,
    *,
    changes: dict,
    chunks: int = 1,
    batch: int = 2,
    length: int = 24,
    ahead: int = 0,
    recompute: str = "none",
    frozen: str = "",
    break_sum: bool = False,
) -> dict:
    """Largest differences of loss, logits and any gradient between the shared model and one process, over all ranks, in float64."""
    tokens, targets, _, _ = draw(batch, length, seed=5)
    extra = {"ahead": [(tokens.roll(i, 1), targets.roll(i, 1)) for i in range(ahead)]} if ahead else {}
    _, reference = make_model(changes)
    expected_loss, expected, expected_logits = one_step(reference, batch, length, **extra)
    _, model = make_model(changes, mesh=mesh, chunks=chunks)
    apply_recompute(model, recompute)
    for (name, mine), other in zip(model.named_parameters(), reference.parameters()):
        assert difference(local_tensor(mine), part(other, mine)) == 0, name
        mine.requires_grad_(not (frozen and frozen in name))
    with unsummed() if break_sum else nullcontext():
        loss, gradients, logits = one_step(model, batch, length, **extra)
    differences = {}
    for name, gradient in gradients.items():
        if frozen and frozen in name:
            assert gradient is None, name
            continue
        differences[name] = difference(summed(gradient, mesh), expected[name])
    where = max(differences, key=differences.get)
    return {
        "loss": worst(abs(loss - expected_loss) / abs(expected_loss)),
        "logits": worst(difference(logits, expected_logits)),
        "gradient": worst(differences[where]),
        "where": where,
        "split": sorted(name for name, p in model.named_parameters() if isinstance(p, DTensor)),
    }


def summed(gradient: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The whole gradient of a parameter: its parts put together, or the ranks' partial sums added."""
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    dist.all_reduce(gradient, group=mesh.get_group())
    return gradient


@contextmanager
def unsummed():
    """A deliberate fault: each rank takes its part of its own partial results, which nobody adds up."""
    right = implementations.start_scatter_sum

    def wrong(rows, group, *, out=None):
        out.copy_(rows.chunk(group.size())[group.rank()])
        return pending.Pending(out)

    implementations.start_scatter_sum = wrong
    try:
        yield
    finally:
        implementations.start_scatter_sum = right


NAMES = {
    "all_gather_single": "gather",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_single": "scatter",
    "reduce_scatter_tensor": "scatter",
}


@contextmanager
def counted():
    """Collectives that are started, by kind, as the elements of the whole tensor of each."""
    found: dict[str, list[int]] = {"gather": [], "scatter": [], "other": []}
    before = {name: getattr(dist, name) for name in (*NAMES, "all_reduce", "all_to_all_single", "broadcast") if hasattr(dist, name)}

    def wrapped(name):
        def call(first, *args, **kwargs):
            sizes = [x.numel() for x in (first, *args) if isinstance(x, torch.Tensor)]
            found[NAMES.get(name, "other")].append(max(sizes))
            return before[name](first, *args, **kwargs)

        return call

    for name in before:
        setattr(dist, name, wrapped(name))
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def collectives(mesh: DeviceMesh, *, chunks: int, layers: int = 3, batch: int = 2, length: int = 24, loss_chunk: int = 5) -> dict:
    """Collectives of one forward and one backward pass, and the sizes that the formulas need."""
    _, model = make_model({"layers": layers}, mesh=mesh, chunks=chunks, loss_chunk=loss_chunk)
    tokens, targets, positions, mask = draw(batch, length)
    with counted() as forward:
        loss = model(tokens, positions=positions, mask=mask, targets=targets)["ce_sum"]
    with counted() as backward:
        loss.backward()
    return {"forward": forward, "backward": backward, "ranks": mesh.size(), "layers": layers, "whole": batch * length * 32}


def stages(mesh: DeviceMesh, *, changes: dict) -> dict[str, float]:
    """Two pipeline stages after one another against the whole model: the loss, and gradients of both."""
    tokens, targets, positions, mask = draw(2, 24)
    _, reference = make_model(changes)
    expected = reference(tokens, positions=positions, mask=mask, targets=targets)["ce_sum"]
    expected.backward()
    first, second = (make_model(changes, mesh=mesh, blocks=range(i, i + 1))[1] for i in (0, 1))
    hidden = first(tokens, positions=positions, mask=mask)["hidden"]
    assert hidden.shape == (2, 24 // mesh.size(), 32)
    loss = second(hidden, positions=positions, mask=mask, targets=targets)["ce_sum"]
    loss.backward()
    whole: dict[str, torch.Tensor] = {}
    for model in (first, second):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                whole[name] = whole.get(name, 0) + summed(parameter.grad, mesh)
    parameters = dict(reference.named_parameters())
    assert whole.keys() == parameters.keys(), whole.keys() ^ parameters.keys()
    return {
        "loss": worst(difference(loss, expected)),
        "gradient": worst(max(difference(gradient, parameters[name].grad) for name, gradient in whole.items())),
    }


def with_fsdp(mesh: DeviceMesh, *, changes: dict, compute: str, params: str, batch: int = 4, length: int = 24) -> dict[str, float]:
    """FSDP2 over half of the ranks and tp over the other half against one process in float64: loss, and gradients by their norms."""
    ranks = dist.get_world_size()
    both = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp_shard", "tp"))
    dtype = torch_dtype(params)
    tokens, targets, positions, mask = draw(batch, length)
    _, reference = make_model(changes)
    expected = reference(tokens, positions=positions, mask=mask, targets=targets)["ce_sum"] / 50
    expected.backward()
    precision = PrecisionConfig(compute=compute, params=params, reduce=params)
    _, model = make_model(
        changes,
        mesh=both["tp"],
        chunks=2,
        dtype=dtype,
        then=lambda model: apply_fsdp(model, mesh=both["dp_shard"], precision=precision, reshard_after_forward=True),
    )
    rows = slice(both.get_local_rank("dp_shard") * 2, both.get_local_rank("dp_shard") * 2 + 2)
    mine = Mask(documents=mask.documents[rows])
    loss = model(tokens[rows], positions=positions[rows], mask=mine, targets=targets[rows])["ce_sum"] / 50
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=both.get_group("dp_shard"))
    differences = {}
    for name, parameter in reference.named_parameters():
        gradient = dict(model.named_parameters())[name].grad
        if "tp" not in gradient.device_mesh.mesh_dim_names:
            dist.all_reduce(gradient.to_local(), group=both.get_group("tp"))
        full = gradient.full_tensor().double()
        differences[name] = ((full - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-3)).item()
    result = {"loss": worst(difference(total, expected)), "gradient": worst(max(differences.values()))}
    return result | ({"control gradient": worst(in_one_process(changes, compute, reference))} if compute == "bf16" else {})


def in_one_process(changes: dict, compute: str, reference: torch.nn.Module) -> float:
    """Largest difference of a gradient from `reference`, relative to its norm, of one process that computes in `compute`."""
    tokens, targets, positions, mask = draw(4, 24)
    _, model = make_model(changes, dtype=torch.float32, then=lambda model: apply_cast(model, torch_dtype(compute)))
    (model(tokens, positions=positions, mask=mask, targets=targets)["ce_sum"] / 50).backward()
    pairs = zip(model.parameters(), reference.parameters())
    return max(((a.grad.double() - b.grad).norm() / b.grad.norm().clamp(min=1e-3)).item() for a, b in pairs)
