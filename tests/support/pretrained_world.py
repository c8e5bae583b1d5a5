"""Loading an existing model into this world's shards: what every rank read, and what it came to."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from llmtrain.config.run import RunConfig
from llmtrain.convert import import_hf
from llmtrain.convert.stored import StoredTensors
from llmtrain.device import select
from llmtrain.engine.native import build
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import resolve
from llmtrain.parallel import mesh as world
from llmtrain.stages.pretrained import load_pretrained
from llmtrain.stages.session import op_call


def watch_reads() -> list[tuple[str, int]]:
    """(name, elements) of every read of a tensor from now on; a read of a whole tensor at once is an error."""
    reads: list[tuple[str, int]] = []
    original = StoredTensors.part

    def part(self, name, ranges):
        tensor = original(self, name, ranges)
        reads.append((name, tensor.numel()))
        return tensor

    def whole(self, name):
        raise AssertionError(f"{name} was read whole")

    StoredTensors.part, StoredTensors.whole = part, whole
    return reads


def load(pretrained: str, parallel: dict, **model) -> dict:
    """Weights of an engine that was started from `pretrained` on this world, its logits, and the elements that each rank read."""
    torch.set_num_threads(1)
    reads = watch_reads()
    cfg = RunConfig.model_validate({"model": {"pretrained": pretrained, **model}, "parallel": parallel, "train": {"steps": 1}})
    device = select("cpu")
    mesh = world.start(cfg.parallel, device=device)
    engine = build(cfg, objective=cross_entropy, mesh=mesh, device=device, ops=resolve({}, op_call(cfg, device)))
    said: list[str] = []
    load_pretrained(SimpleNamespace(cfg=cfg, mesh=mesh, console=SimpleNamespace(message=said.append)), engine)
    state = engine.state()
    whole = {name: (t.full_tensor() if isinstance(t, DTensor) else t).numpy().copy() for name, t in state.items()}
    tokens = torch.arange(24)[None] * 3 % 97
    found = {"state": whole, "logits": engine.logits(tokens).numpy(), "reads": mesh.gather(reads), "said": said}
    mesh.leave()
    return found


def load_all(scenarios: dict[str, dict]) -> dict[str, dict]:
    """Several loads in one world, by name."""
    return {name: load(**scenario) for name, scenario in scenarios.items()}


class OneMatrix(nn.Module):
    """A module with the matrix of that name."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)


def placements(folder: str) -> dict[str, tuple[bool, int]]:
    """placement -> (whether a 97 x 32 head loaded into it is the stored one, elements read by this rank), on a 2 x 2 mesh."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cfg = import_hf.model_config(folder)
    stored = dict(import_hf.read_weights(folder, cfg))["head.weight"]
    targets = {
        str(placed): distribute_tensor(torch.zeros(97, 32), mesh, placed)
        for placed in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)], [Shard(1), Shard(1)], [Replicate(), Shard(1)])
    }
    module = OneMatrix(distribute_tensor(torch.zeros(97, 32), mesh["tp"], [Shard(0)]))
    fully_shard(module, mesh=mesh["dp"])
    targets["fsdp over tp"] = module.matrix.detach()
    found = {}
    for name, target in targets.items():
        reads = watch_reads()
        import_hf.load_into({"head.weight": target}, folder, cfg)
        found[name] = (torch.equal(target.full_tensor(), stored), sum(n for _, n in reads))
    return found
