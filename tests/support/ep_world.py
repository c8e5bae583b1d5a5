"""Mixtures of experts shared over the ranks of this world, compared with the same layer on one rank over all tokens."""

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from traffic_world import Counted, Even, members

from llmtrain.compat import fsdp_sum_gradients
from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import EXPERT_AXES, MeshShape
from llmtrain.model import build, initialise
from llmtrain.model.moe import MoE
from llmtrain.ops import Call, Mask, resolve
from llmtrain.parallel.ep import AllToAllDispatcher, apply_ep
from llmtrain.parallel.mesh import node_groups
from llmtrain.parallel.ops.in_flight import InFlight
from llmtrain.parallel.recompute import apply_recompute

E, D, WIDTH, K = 8, 16, 24, 2
MODEL = {"vocab_size": 61, "layers": 2, "hidden": D, "max_seq_len": 48, "attention": {"heads": 4, "kv_heads": 2}, "init": {"std": 0.2}}
FFN = {"kind": "moe", "experts": E, "top_k": K, "hidden": WIDTH}


def run(cases: dict[str, dict]) -> dict[str, dict]:
    """Each case by its function in this module; what rank 0 found."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = {name: globals()[case.pop("check")](**case) for name, case in cases.items()}
    dist.destroy_process_group()
    return found


def mesh_of(*, ep: int, etp: int = 1):
    """The expert mesh of this world; what ep and etp leave is efsdp."""
    sizes = {"pp": 1, "dp_replicate": 1, "efsdp": dist.get_world_size() // (ep * etp), "ep": ep, "etp": etp}
    return init_device_mesh("cpu", tuple(sizes[axis] for axis in EXPERT_AXES), mesh_dim_names=EXPERT_AXES)


def by_nodes(*, ep: int, inner: int | None, etp: int = 1) -> dict:
    """What `apply_ep` is told for nodes of `inner` ranks of ep; nothing for None."""
    if inner is None:
        return {}
    shape = MeshShape(dp_shard=dist.get_world_size() // etp, tp=etp, ep=ep, etp=etp, ep_inner=inner)
    return {"kind": "hierarchical", "nodes": node_groups(shape)}


def moe_layer(dtype: torch.dtype, ffn: dict, avoided: list[int], seed: int = 0) -> MoE:
    """Weights from the seed. The tokens' first feature is 1, so that experts to be avoided can be given a low score by it."""
    call = Call(device="cpu", dtype=dtype, expert_widths=(ffn.get("descend", D), WIDTH))
    layer = MoE(ModelConfig(**MODEL, ffn=FFN | ffn), ops=resolve({}, call)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        layer.router.weight[:, 0] = 0.0
        layer.router.weight[avoided, 0] = -60.0
    if layer.capacity is not None:  # drops by the token alone, so that it does not matter who computes it
        layer._admitted = lambda choice, x: choice.ids.masked_fill(x[:, 1:3] > 0.5, E)
    return layer


def tokens_of(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and the weights of the outputs in the loss, [all tokens, D] each."""
    generator = torch.Generator().manual_seed(1)
    x, weigh = torch.randn(2, sum(sizes), D, generator=generator, dtype=torch.float64).to(dtype)
    x[:, 0] = 1.0
    return x, weigh


def worst(**differences: float) -> dict[str, float]:
    """The largest over all ranks of each difference."""
    values = torch.tensor(list(differences.values()), dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(differences, values.tolist()))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def layer_equals_one_rank(
    *,
    ep: int,
    etp: int = 1,
    inner: int | None = None,
    sizes: list[int],
    avoided: list[int] = (),
    ffn: dict | None = None,
    dtype=torch.float64,
    fsdp: bool = False,
) -> dict:
    """Largest differences of outputs and of all gradients, and how many rows each rank received."""
    rank, mesh = dist.get_rank(), mesh_of(ep=ep, etp=etp)
    alone, shared = (moe_layer(dtype, ffn or {}, list(avoided)) for _ in range(2))
    apply_ep(shared, expert_mesh=mesh, **by_nodes(ep=ep, inner=inner, etp=etp))
    if fsdp:
        fully_shard(shared.experts, mesh=mesh["efsdp"], shard_placement_fn=lambda p: Shard(1))
        fsdp_sum_gradients(shared.experts)
    x, weigh = tokens_of(sizes, dtype)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    given, local = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    expected, got = alone(given), shared(local)
    (expected * weigh).sum().backward()
    (got * weigh[mine]).sum().backward()
    differences = {"out": distance(got, expected[mine]), "x": distance(local.grad, given.grad[mine])}
    whole_layer = dict(alone.named_parameters())
    for name, parameter in shared.named_parameters():
        differences[name] = distance(gradient_of(name, parameter, mesh), whole_layer[name].grad)
    return {"differences": worst(**differences), "rows": everyone(rows_here(alone, x, mesh)), "norm": float(given.grad.norm())}


def gradient_of(name: str, parameter: nn.Parameter, mesh) -> Tensor:
    """Summed over the ranks, whole."""
    if "experts." in name:
        return whole(expert_gradient(parameter, mesh))
    gradient = parameter.grad.clone()
    dist.all_reduce(gradient)
    return gradient


def expert_gradient(parameter: nn.Parameter, mesh) -> Tensor:
    """Summed over efsdp, where FSDP2 has not done it."""
    gradient = parameter.grad
    sharded = isinstance(parameter, DTensor) and "efsdp" in parameter.device_mesh.mesh_dim_names
    if not sharded and mesh["efsdp"].size() > 1:
        dist.all_reduce(gradient.to_local(), group=mesh.get_group("efsdp"))
    return gradient


def everyone(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rows_here(alone: MoE, x: Tensor, mesh) -> int:
    """Rows that the experts of this rank have to compute."""
    held = E // mesh["ep"].size()
    first = mesh["ep"].get_local_rank() * held
    ids = alone.router(x)[1]
    return int(((ids >= first) & (ids < first + held)).sum())


def two_in_flight(*, ep: int, inner: int | None = None) -> dict:
    """Two micro-batches sent before either is waited for, and combined in the other order; backward too."""
    rank, mesh = dist.get_rank(), mesh_of(ep=ep)
    shared = moe_layer(torch.float64, {}, [])
    apply_ep(shared, expert_mesh=mesh, **by_nodes(ep=ep, inner=inner))
    dispatcher, inputs, results = shared.routed.dispatcher, [], {}
    x, _ = tokens_of([5 + rank, 9 - 2 * rank], torch.float64)
    for how in ("one after the other", "interleaved"):
        parts = [part.clone().requires_grad_() for part in x.split([5 + rank, 9 - 2 * rank])]
        routes = [(part, *shared.router(part)[:2]) for part in parts]
        if how == "interleaved":
            handles = [dispatcher.start(*route) for route in routes]
            arrived = [dispatcher.wait(handle) for handle in handles]
            back = [dispatcher.combine_start(shared.experts(a.rows, a.counts), a.combine) for a in reversed(arrived)]
            out = [dispatcher.combine_wait(handle) for handle in back][::-1]
        else:
            out = [shared.routed(*route) for route in routes]
        (out[0].sum() + (out[1] ** 2).sum()).backward()
        results[how] = [t.detach() for t in out] + [part.grad for part in parts]
        inputs.append(handle_twice(dispatcher, routes[0]) if how == "interleaved" else None)
    one, two = results.values()
    return worst(**{f"{i}": distance(a, b) for i, (a, b) in enumerate(zip(one, two))}) | {"twice": inputs[1]}


def handle_twice(dispatcher: AllToAllDispatcher, route) -> str:
    """The error of a handle that is waited for a second time."""
    handle = dispatcher.start(*route)
    dispatcher.wait(handle)
    try:
        dispatcher.wait(handle)
    except RuntimeError as error:
        return str(error)
    return "no error"


def on_meta(ffn: dict) -> tuple[ModelConfig, nn.Module]:
    cfg = ModelConfig.model_validate(MODEL | {"ffn": ffn, "mtp": {"heads": 1}})
    with torch.device("meta"):
        return cfg, build(cfg, resolve({}, Call(device="cpu", dtype=torch.float64, documents=True)), 16).double()


def materialised(cfg: ModelConfig, model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    initialise(model, cfg, 3)
    return model


def model_equals_one_rank(*, ep: int, etp: int = 1, inner: int | None = None, fsdp: bool = False, recompute: str = "none") -> dict:
    """A whole model from meta: its initial weights, and loss and gradients with a row of the batch on each rank of ep."""
    rank, mesh = dist.get_rank(), mesh_of(ep=ep, etp=etp)
    (cfg, alone), (_, shared) = on_meta(FFN), on_meta(FFN)
    names = [name for name, _ in alone.named_parameters()]
    apply_ep(shared, expert_mesh=mesh, **by_nodes(ep=ep, inner=inner, etp=etp))
    apply_recompute(shared, recompute)
    if fsdp:
        for layer in [m for m in shared.modules() if isinstance(m, MoE)]:
            fully_shard(layer.experts, mesh=mesh["efsdp"])
            fsdp_sum_gradients(layer.experts)
    assert names == [name for name, _ in shared.named_parameters()]
    materialised(cfg, alone), materialised(cfg, shared)
    weights = {name: distance(whole(p.detach()), dict(alone.named_parameters())[name].detach()) for name, p in shared.named_parameters()}
    assert sum(isinstance(p, DTensor) for p in shared.parameters()) == 9  # three stacks in two blocks and the head of MTP
    rows = dist.get_world_size() // etp
    tokens = torch.randint(0, 61, (rows, 24), generator=torch.Generator().manual_seed(0))
    mine = slice(rank // etp, rank // etp + 1)
    losses = [loss_of(model, rows) for model, rows in ((alone, tokens), (shared, tokens[mine]))]
    # Without tp proper, the ranks of etp compute the same tokens: each of them has its loss once.
    losses[0].backward()
    (losses[1] / etp).backward()
    total = losses[1].detach() / etp
    dist.all_reduce(total)
    differences = {"weights": max(weights.values()), "loss": distance(total, losses[0].detach())}
    expected = dict(alone.named_parameters())
    for name, parameter in shared.named_parameters():
        differences[name] = distance(gradient_of(name, parameter, mesh), expected[name].grad)
    return worst(**differences)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    following, after = tokens.roll(-1, 1), tokens.roll(-2, 1)
    out = model(tokens, mask=Mask(), targets=following, ahead=[(following, after)])
    return out["ce_sum"] + out["mtp_weight"] * out["mtp_ce_sum"]


def refusals() -> dict[str, str]:
    """Messages of what cannot be shared out."""
    found = {}
    shapes: dict[str, tuple[dict, Callable]] = {
        "experts": (FFN | {"experts": 7}, lambda: mesh_of(ep=2)),
        "width": (FFN | {"hidden": 21}, lambda: mesh_of(ep=1, etp=2)),
    }
    for name, (ffn, mesh) in shapes.items():
        try:
            apply_ep(on_meta(ffn)[1], expert_mesh=mesh())
        except UserError as error:
            found[name] = str(error)
    return found


def order_of_events(*, ep: int, inner: int | None = None) -> list[str]:
    """What one pass through a layer with a shared expert does, in order: collectives begun and waited for, forward and backward."""
    events: list[str] = []
    shared = moe_layer(torch.float64, {"shared_experts": 1}, [])
    apply_ep(shared, expert_mesh=mesh_of(ep=ep), **by_nodes(ep=ep, inner=inner))
    for name, module, weight in (
        ("experts", shared.experts, shared.experts.up_proj),
        ("shared expert", shared.shared, shared.shared.up_proj.weight),
    ):
        module.register_forward_hook(lambda *_, name=name: events.append(name))
        weight.register_post_accumulate_grad_hook(lambda _, name=name: events.append(f"{name} backward"))
    launch, finish = InFlight.launch, InFlight.finish

    def launched(flight: InFlight, rows: Tensor, *, backward: bool) -> Tensor:
        buffer = launch(flight, rows, backward=backward)
        if rows.shape[1] == D:
            events.append(f"{flight._pending[0].works[0].op} begins")
        return buffer

    def finished(flight: InFlight) -> Tensor:
        name, buffer = flight._pending[0].works[0].op, finish(flight)
        if buffer.shape[1] == D:
            events.append(f"{name} ends")
        return buffer

    x, _ = tokens_of([6], torch.float64)
    InFlight.launch, InFlight.finish = launched, finished
    try:
        shared(x.requires_grad_()).sum().backward()
    finally:
        InFlight.launch, InFlight.finish = launch, finish
    return events


class BetweenNodes(Counted):
    """Numbers of vectors of width D that this rank sends to other nodes, by collective; nodes are `size` ranks each."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.vectors = size, Counter()

    def _count(self, name: str, func, args: tuple) -> None:
        kind = self.KINDS[name]
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
        group = dist.ProcessGroup.unbox(given["process_group"])
        rows = given.get("input", given.get("input_tensor"))
        if rows.dim() < 2 or rows.shape[1] != D:
            return
        far = [rank // self.size != dist.get_rank() // self.size for rank in members(group)]
        parts = given.get("input_split_sizes") or [len(rows) // (1 if kind == "all_gather" else group.size())] * group.size()
        self.vectors[kind] += sum(part for part, away in zip(parts, far) if away)


def vectors_between_nodes(*, k: int, tokens: int) -> dict[str, dict[str, int]]:
    """Of one pass forward and backward over `tokens` tokens that go to all experts alike, with 2 ranks a node."""
    found = {}
    for name, inner in (("all_to_all", None), ("hierarchical", 2)):
        layer = moe_layer(torch.float64, {"top_k": k}, [])
        layer.router.forward = Even(layer.router)
        apply_ep(layer, expert_mesh=mesh_of(ep=4), **by_nodes(ep=4, inner=inner))
        x, _ = tokens_of([tokens], torch.float64)
        with BetweenNodes(2) as counted:
            layer(x.requires_grad_()).sum().backward()
        found[name] = dict(counted.vectors)
    return found
