"""A model over several ranks for generation and evaluation: whole sequences on every rank, so that a cache may hold them.

Training shares the sequence between the ranks of tp; a step of generation has one token, so here every rank of tp sees all positions.
A prompt has many: its partial sums can be added up tile by tile, each while the next one is computed (`SharedModel.set_tp_chunks`).
No gradient flows through any of this.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from llmtrain_kernels.tiled_reduce import Tile, attention_project_reduce, project_reduce, tiles
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.data.batch import NO_TARGET
from llmtrain.layout.stages import split_layers
from llmtrain.model.attention import Attention
from llmtrain.model.moe import MoE
from llmtrain.model.transformer import cut
from llmtrain.parallel.adapted import own_rows
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.hang.where import Begun, device_wait, recorded, watch_layers
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.ops import gather_vocabulary
from llmtrain.parallel.ops.vocabulary import first_entry
from llmtrain.parallel.pipeline import from_stage
from llmtrain.parallel.serve_experts import share_experts
from llmtrain.parallel.tp import Splitter, check_tp


def share(model: nn.Module, mesh: Mesh) -> "SharedModel":
    """`model`, whole and on meta, as this rank's part of a model over the axes pp, tp, ep and etp of `mesh`, in place.

    Ranks that differ along dp_shard alone hold the same dense parts, and different experts. Raises UserError for a model that cannot be
    split so.
    """
    shape, splitter = mesh.shape, None
    if shape.pp > 1:
        layers = split_layers(model.cfg, shape.pp, seq_len=model.cfg.max_seq_len)
        place = mesh.place("pp")
        first = sum(layers[:place])
        cut(model, blocks=range(first, first + layers[place]), first=place == 0, last=place == shape.pp - 1)
    if shape.tp > 1:
        check_tp(model.cfg, shape.tp)
        splitter = _WholeSequence(mesh.device_mesh["tp"], model.cfg.vocab_size)
        splitter.model(model)
    if mesh.experts is not None:
        share_experts(model, mesh.experts)
    watch_layers(model)
    return SharedModel(model, mesh, splitter)


class SharedModel(nn.Module):
    """Called as the whole model is, by all ranks together and with the same tokens; every rank gets the logits."""

    def __init__(self, part: nn.Module, mesh: Mesh, splitter: "_WholeSequence | None" = None):
        super().__init__()
        self.part, self._mesh, self._splitter = part, mesh, splitter
        self.cfg: ModelConfig = part.cfg

    def set_tp_chunks(self, count: int) -> None:
        """Add up the partial sums of tp in about `count` tiles from the next pass of several tokens on. Raises ValueError without tp."""
        if self._splitter is None:
            raise ValueError(f"tp_chunks {count}: parallel.tp is 1, so there is nothing to add up")
        self._splitter.chunks = count

    @property
    def rope(self) -> nn.Module | None:
        """The model's rotation."""
        return self.part.rope

    def set_rope_base(self, base: float) -> None:
        """As Transformer.set_rope_base."""
        self.part.set_rope_base(base)

    def forward(
        self, tokens: Tensor, *, mask, positions: Tensor | None = None, targets: Tensor | None = None, cache=None, last: int | None = None
    ) -> dict[str, Tensor]:
        """tokens [B,S] -> {"logits": [B,S or last,V]} or {"ce_sum"}; arguments as in Transformer.forward."""
        found = self._answer(tokens, mask=mask, positions=positions, targets=targets, cache=cache, last=last)
        if self._mesh.device.kind != "cpu":  # whoever called reads it next, and knows nothing of other ranks that may be missing
            with device_wait():
                self._mesh.device.synchronize()
        return found

    def _answer(
        self, tokens: Tensor, *, mask, positions: Tensor | None, targets: Tensor | None, cache, last: int | None
    ) -> dict[str, Tensor]:
        place, stages = self._mesh.place("pp"), self._mesh.shape.pp
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        x = tokens if place == 0 else self._receive(tokens)
        wanted = {"targets": targets} if place == stages - 1 else {}
        out = self.part(x, mask=mask, positions=positions, cache=cache, last=last, **wanted)
        if stages == 1:
            return out
        if place < stages - 1:
            with recorded("send", self._mesh.group("pp"), peer=self._neighbour(1)):
                dist.send(out["hidden"].contiguous(), group=self._mesh.group("pp"), group_dst=place + 1)
        if targets is not None:
            return {"ce_sum": self._from_last(out.get("ce_sum"), (), torch.float64)}
        shape = (tokens.shape[0], tokens.shape[1] if last is None else last, self.cfg.vocab_size)
        return {"logits": self._from_last(out.get("logits"), shape, self._dtype)}

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.part.parameters()).dtype

    def _neighbour(self, by: int) -> int:
        """The global rank so many stages further on."""
        return dist.get_global_rank(self._mesh.group("pp"), self._mesh.place("pp") + by)

    def _receive(self, tokens: Tensor) -> Tensor:
        x = torch.empty(*tokens.shape, self.cfg.hidden, dtype=self._dtype, device=tokens.device)
        with recorded("recv", self._mesh.group("pp"), peer=self._neighbour(-1)):
            dist.recv(x, group=self._mesh.group("pp"), group_src=self._mesh.place("pp") - 1)
        return x

    def _from_last(self, result: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        device = next(self.part.parameters()).device
        return from_stage(result, shape, dtype, group=self._mesh.group("pp"), source=self._mesh.shape.pp - 1, device=device)


class _WholeSequence(Splitter):
    """Layers split as in training, whose partial sums are added on every rank instead of being shared out over the sequence."""

    chunks = 1
    """Tiles in which that is done where there are several tokens."""

    def model(self, model: nn.Module) -> None:
        super().model(model)
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.ops = _Projecting(layer.ops, partial(self.attend_in_tiles, layer))
            if isinstance(layer, MoE) and layer.shared is not None and layer.shared.down_proj.in_features % self.mesh.size() == 0:
                self.feed_forward(layer.shared)

    def qkv(self, attention: nn.Module, kv_rows: slice | None, x: Tensor) -> tuple[Tensor, ...]:
        projections = zip((attention.q_proj, attention.k_proj, attention.v_proj), (None, kv_rows, kv_rows))
        return tuple(F.linear(x, own_rows(proj.weight, rows), own_rows(proj.bias, rows)) for proj, rows in projections)

    def widen(self, attention: nn.Module, queries: Tensor, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (local_tensor(proj.weight) for proj in (attention.q_up_proj, attention.kv_up_proj))
        return *(F.linear(x, weight) for x, weight in zip((queries, latent), weights)), shared

    def attend_in_tiles(self, attention: nn.Module, op, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """The attention op: [B,H/t,S,d], or in tiles, which go on through the projection and the sum over ranks: [B,S,D]."""
        if self.chunks == 1 or q.shape[2] == 1:
            return op(q, k, v, **options)
        weight = local_tensor(attention.out_proj.weight)
        return attention_project_reduce(q, k, v, weight, attention=op, reduce=self._start_sum, count=self.chunks, **options)

    def attention_output(self, attention: nn.Module, out: Tensor) -> Tensor:
        """[B,H/t,S,d], or [B,S,D] of tiles that are summed already -> [B,S,D]."""
        return self._add_bias(attention.out_proj, out) if out.dim() == 3 else self._add(attention.out_proj, out.transpose(1, 2).flatten(2))

    def run_feed_forward(self, ffn: nn.Module, x: Tensor) -> Tensor:
        rows, down = x.reshape(1, -1, x.shape[-1]), local_tensor(ffn.down_proj.weight)

        def hidden(tile: Tile) -> Tensor:
            return ffn.activate(*(F.linear(rows[tile], local_tensor(p.weight), local_tensor(p.bias)) for p in ffn.expanding()))

        # Shared experts get rows without their sequences, which may be one token of each.
        count, shape = (self.chunks if x.dim() == 3 and x.shape[1] > 1 else 1), (1, rows.shape[1])
        out = project_reduce(hidden, down, tiles=tiles(*shape, count), shape=shape, reduce=self._start_sum)
        return self._add_bias(ffn.down_proj, out.view_as(x))

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        weight = local_tensor(embedding.weight)
        local = tokens - first_entry(self.vocab_size, self.group)
        elsewhere = (local < 0) | (local >= weight.shape[0])
        return self._sum(F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0))

    def embed_positions(self, whole, positions: Tensor) -> Tensor:
        return whole(positions)

    def head(self, head: nn.Module, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self._logits(head, hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows, wanted in zip(hidden.flatten(0, 1).split(head.loss_chunk), targets.flatten().split(head.loss_chunk)):
            logits = self._logits(head, rows[None])[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total += F.cross_entropy(logits, wanted, ignore_index=NO_TARGET, reduction="sum")
        return total

    def _logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, local_tensor(head.weight).to(hidden.dtype))
        return gather_vocabulary(logits, vocab_size=self.vocab_size, group=self.group)

    def _add(self, proj: nn.Linear, x: Tensor) -> Tensor:
        return self._add_bias(proj, self._sum(F.linear(x, local_tensor(proj.weight))))

    @staticmethod
    def _add_bias(proj: nn.Linear, out: Tensor) -> Tensor:
        return out if proj.bias is None else out + local_tensor(proj.bias)

    def _start_sum(self, part: Tensor) -> Begun:
        begun = Begun("all_reduce", self.group)
        return begun.by(dist.all_reduce(part, group=self.group, async_op=True))

    def _sum(self, partial_sums: Tensor) -> Tensor:
        with recorded("all_reduce", self.group):
            dist.all_reduce(partial_sums, group=self.group)
        return partial_sums


class _Projecting:
    """The ops of one attention module, whose attention op is `attend(op, q, k, v, ...)`."""

    def __init__(self, ops, attend: Callable[..., Tensor]):
        self._ops, self._attend = ops, attend

    def __getattr__(self, op: str):
        return getattr(self._ops, op)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return self._attend(self._ops.attention, q, k, v, **options)
