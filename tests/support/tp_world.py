"""Models and ops over ranks of tp against one process: every rank draws the same whole tensors and compares its part."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from llmtrain.config.model import ModelConfig
from llmtrain.model import build, initialise
from llmtrain.ops import Call, Mask, resolve
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


def in_world(function: str, cases: dict[str, dict]) -> dict[str, object]:
    """Several cases of one function of this module in one world, by name."""
    mesh = start()
    results = {name: globals()[function](mesh, **case) for name, case in cases.items()}
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


def make_model(changes: dict, *, mesh: DeviceMesh | None = None, chunks: int = 1, dtype=torch.float64, loss_chunk: int = 5):
    """A model filled from one seed, shared over `mesh` if given; vectors are away from their trivial 0 and 1."""
    cfg = ModelConfig.model_validate(SMALL | changes)
    call = Call(device="cpu", dtype=dtype, documents=True, head_dim=cfg.head_dim, heads=cfg.attention.heads, kv_heads=cfg.kv_heads)
    with torch.device("meta"):
        model = build(cfg, resolve({}, call), loss_chunk).to(dtype)
    names = [name for name, _ in model.named_parameters()]
    if mesh is not None:
        apply_tp(model, mesh, chunks=chunks)
    assert names == [name for name, _ in model.named_parameters()]
    model = model.to_empty(device="cpu")
    initialise(model, cfg, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                extra = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
                whole(parameter)[...] += part(extra, parameter).to(dtype)
    return cfg, model


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of `full`, split as `like` is."""
    if not isinstance(like, DTensor):
        return full
    chunks = full.chunk(like.device_mesh.size(), like.placements[0].dim)
    return chunks[like.device_mesh.get_local_rank()]


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
    wrap: str = "",
    dtype: str = "float64",
):
    """Largest differences of loss, logits and any gradient between the shared model and one process, over all ranks."""
    kind = getattr(torch, dtype)
    tokens, targets, _, _ = draw(batch, length, seed=5)
    extra = {"ahead": [(tokens.roll(i, 1), targets.roll(i, 1)) for i in range(ahead)]} if ahead else {}
    _, reference = make_model(changes, dtype=kind)
    expected_loss, expected, expected_logits = one_step(reference, batch, length, **extra)
    _, model = make_model(changes, mesh=mesh, chunks=chunks, dtype=kind)
    if wrap:
        from llmtrain.parallel.recompute import apply_recompute

        apply_recompute(model, wrap)
    for (name, mine), other in zip(model.named_parameters(), reference.parameters()):
        assert difference(whole(mine), part(other, mine)) == 0, name
    loss, gradients, logits = one_step(model, batch, length, **extra)
    by_name = {}
    for name, gradient in gradients.items():
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
        by_name[name] = difference(gradient, expected[name])
    name = max(by_name, key=by_name.get)
    return {
        "loss": worst(abs(loss - expected_loss) / abs(expected_loss)),
        "logits": worst(difference(logits, expected_logits)),
        "gradient": worst(by_name[name]),
        "where": name,
        "split": sorted(n for n, p in model.named_parameters() if isinstance(p, DTensor)),
    }
