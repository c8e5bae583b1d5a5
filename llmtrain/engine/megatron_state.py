"""Parameters and moments of the engine megatron in canonical form, and back: `convert.megatron_map` on each rank's own parts."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from llmtrain.config.model import ModelConfig
from llmtrain.convert.megatron_map import PADDED, Entry, Part, entries
from llmtrain.engine.megatron_optimizer import Optimizer
from llmtrain.parallel.mesh import Mesh

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass
class Held:
    """One of megatron-core's parameters on this rank."""

    entry: Entry
    parameter: Tensor
    rows: int | None = None
    """Rows that are no padding of the vocabulary, of a table."""

    def split(self, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """This rank's parts of the canonical parameters."""
        return zip(self.entry.parts, self.entry.split(tensor if self.rows is None else tensor[: self.rows]))

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse; padding is zeros."""
        tensor = self.entry.join(parts)
        if self.rows is None:
            return tensor
        return torch.cat((tensor, tensor.new_zeros(len(self.parameter) - self.rows, tensor.shape[1])))


class Layout:
    """Which parameters this rank holds, and where their canonical counterparts lie on the mesh."""

    def __init__(self, cfg: ModelConfig, models: dict[int, nn.Module], mesh: Mesh):
        self.cfg, self.mesh = cfg, mesh
        by_name = {entry.name: entry for entry in entries(cfg)}
        self.held: dict[str, Held] = {}
        self.copy: Tensor | None = None
        """The last stage's copy of an embedding that is tied, or looks ahead."""
        for stage, model in models.items():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                whole = self._whole_name(name, model)
                if whole == "output_layer.weight" and cfg.tie_embeddings:
                    self.copy = tensor if stage else None
                elif stage and whole == "embedding.word_embeddings.weight":
                    self.copy = tensor
                elif whole in by_name:
                    self.held[whole] = Held(by_name[whole], tensor, self._rows(whole, tensor))
                elif tensor.requires_grad:
                    raise RuntimeError(f"megatron-core's {whole} has no canonical counterpart")

    def _whole_name(self, name: str, model: nn.Module) -> str:
        words = name.split(".")
        if words[:2] == ["decoder", "layers"]:
            words[2] = str(model.decoder.layers[int(words[2])].layer_number - 1)
        if "local_experts" in words:
            at = words.index("local_experts") + 1
            words[at] = str(int(words[at]) + self._first_expert())
        return ".".join(words)

    def _first_expert(self) -> int:
        experts = self.mesh.experts
        return 0 if experts is None else experts.get_local_rank("ep") * self.cfg.ffn.experts // self.mesh.shape.ep

    def _rows(self, name: str, tensor: Tensor) -> int | None:
        if name not in PADDED:
            return None
        return max(0, min(len(tensor), self.cfg.vocab_size - len(tensor) * self.mesh.place("tp")))

    def mark(self) -> None:
        """Tell megatron-core which parameters tensor parallelism cuts, for the gradients' norm, as drawing weights would, which is left to
        us; and which are experts', whose gradients are summed over other ranks."""
        for held in self.held.values():
            split = any(part.dim is not None or part.expert is not None for part in held.entry.parts)
            held.parameter.tensor_model_parallel = split
            if any(part.expert is not None for part in held.entry.parts) and self.mesh.shape.tp > self.mesh.shape.etp:
                # Without expert parallelism it takes experts for dense layers, whose gradients ranks of tp do not add up.
                held.parameter.allreduce = False

    def canonical(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors, DTensors on a mesh, of one tensor per parameter held here, by megatron-core's name."""
        found: dict[str, Tensor] = {}
        stacks: dict[str, dict[int, tuple[Part, Tensor]]] = {}
        for name, tensor in tensors.items():
            for part, local in self.held[name].split(tensor):
                if part.expert is None:
                    found[part.name] = self._placed(part, local.contiguous())
                else:
                    stacks.setdefault(part.name, {})[part.expert] = part, local
        for name, experts in stacks.items():
            (part, _), *_ = experts.values()
            found[name] = self._placed(part, torch.stack([experts[index][1] for index in sorted(experts)]))
        return found

    def local(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(megatron-core's name, this rank's tensor) out of canonical tensors as `canonical` gives them, of what they make whole."""
        for name, held in self.held.items():
            if any(part.name not in tensors for part in held.entry.parts):
                continue
            parts = []
            for part in held.entry.parts:
                local = tensors[part.name]
                local = local.to_local() if isinstance(local, DTensor) else local
                parts.append(local if part.expert is None else local[part.expert - self._first_expert()])
            yield name, held.join(parts)

    def _placed(self, part: Part, local: Tensor) -> Tensor:
        if self.mesh.world == 1:
            return local
        expert = part.expert is not None
        over = self.mesh.experts_of_a_stage if expert and self.mesh.experts is not None else self.mesh.dense
        placements = dict.fromkeys(over.mesh_dim_names, Replicate())
        shape = list(local.shape)
        if expert and self.mesh.experts is not None:
            placements["ep"], shape[0] = Shard(0), self.cfg.ffn.experts
            if part.dim is not None and self.mesh.shape.etp > 1:
                placements["etp"], shape[1 + part.dim] = Shard(1 + part.dim), shape[1 + part.dim] * self.mesh.shape.etp
        elif part.dim is not None and not expert and self.mesh.shape.tp > 1:
            placements["tp"] = Shard(part.dim)
            shape[part.dim] = part.size if part.dim == 0 else shape[part.dim] * self.mesh.shape.tp
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, over, list(placements.values()), run_check=False, shape=torch.Size(shape), stride=stride)


class State:
    """The engine's canonical state."""

    def __init__(self, layout: Layout, optimizer: Optimizer):
        self.layout, self.optimizer = layout, optimizer

    @torch.no_grad()
    def get(self) -> dict[str, Tensor]:
        """Weights and moments by canonical name and kind: copies, so that a change to them counts when `put` takes them."""
        found = {}
        for kind in KINDS:
            tensors = {
                name: self.optimizer.whole(held.parameter, kind)
                for name, held in self.layout.held.items()
                if kind == "weight" or held.parameter.requires_grad
            }
            found |= {f"{name}.{kind}": tensor for name, tensor in self.layout.canonical(tensors).items()}
        return found

    @torch.no_grad()
    def put(self, state: dict[str, Tensor]) -> None:
        """Take over what `get` gave, and make the copy of an embedding equal to it."""
        for kind in KINDS:
            tensors = {name.removesuffix(f".{kind}"): tensor for name, tensor in state.items() if name.endswith(f".{kind}")}
            for name, local in self.layout.local(tensors):
                self.optimizer.set_whole(self.layout.held[name].parameter, kind, local)
            self._tie(kind)

    def _tie(self, kind: str) -> None:
        group, held = mpu.get_embedding_group(check_initialized=False), self.layout.held.get("embedding.word_embeddings.weight")
        cfg = self.layout.cfg
        copied = (cfg.tie_embeddings or cfg.mtp.heads > 0) and self.layout.mesh.shape.pp > 1
        if not copied or (held is None and self.layout.copy is None):
            return
        parameter = held.parameter if held is not None else self.layout.copy
        tensor = self.optimizer.whole(parameter, kind)
        dist.broadcast(tensor, dist.get_process_group_ranks(group)[0], group=group)
        if held is None:
            self.optimizer.set_whole(parameter, kind, tensor)
