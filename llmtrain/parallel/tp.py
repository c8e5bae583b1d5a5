"""Tensor and sequence parallelism: every layer shared by the ranks of tp, applied to a model from outside.

Between blocks each rank holds its own S/t positions. Queries, keys, values, gate and up are split by columns, the projections back by rows,
embedding and head by vocabulary (Megatron, arXiv 1909.08053 and 2205.05198). The gradient of a parameter that is not split is a partial sum
on each rank.
"""

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.model.attention import Attention
from llmtrain.model.ffn import GELU, SwiGLU
from llmtrain.model.head import Head
from llmtrain.model.mla import LatentAttention
from llmtrain.parallel.adapted import gather_matmul, matmul_scatter
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.ops import (
    all_gather_matmul,
    all_gather_sequence,
    gather_vocabulary,
    vocab_cross_entropy,
    vocab_embedding,
)
from llmtrain.parallel.ops.choice import check_implementation
from llmtrain.parallel.ops.implementations import Demand
from llmtrain.parallel.ops.sequence import local_length


def apply_tp(model: nn.Module, mesh: DeviceMesh, *, chunks: int = 1, implementation: str = "chunked") -> None:
    """Share the layers of `model` (on meta, or a pipeline stage with parts missing) between the ranks of `mesh`, in place.

    Split weights become DTensors over `mesh` without communication; parameter names do not change. Afterwards the model takes whole
    sequences of tokens and gives a whole loss or whole logits, as before, while the hidden states between blocks, and between stages of a
    pipeline, are [B,S/t,D]. Branches that are neither attention nor a dense feed-forward stay whole and see S/t positions. A cache, and
    logits of the last positions alone, are refused.

    Args:
        model: a Transformer, or another family with its parts.
        mesh: of one axis.
        chunks: pieces of the sequence that are sent one by one, each while another one is multiplied.
        implementation: `chunked`, or `symm_mem` on cuda and `mc2` on npu, which split into pieces of their own.

    Raises UserError for a model whose heads, hidden width or vocabulary cannot be split by the number of ranks.
    """
    if mesh.size() == 1:
        return
    check_tp(model.cfg, mesh.size())
    check_implementation(implementation, Demand(mesh.device_type, mesh.size()))
    Splitter(mesh, model.cfg.vocab_size, chunks=chunks, implementation=implementation).model(model)
    model.register_forward_pre_hook(_refuse, with_kwargs=True)


def check_tp(cfg: ModelConfig, ranks: int) -> None:
    """Raise UserError, with the arithmetic, unless a model of this shape can be split between `ranks` ranks."""
    heads, kv_heads, vocab = cfg.attention.heads, cfg.kv_heads, cfg.vocab_size
    tp = f"parallel.tp {ranks}"
    if heads % ranks:
        raise UserError(f"{tp} does not divide model.attention.heads {heads} ({heads} / {ranks} = {heads / ranks:g} heads a rank)")
    if kv_heads % ranks and ranks % kv_heads:
        raise UserError(
            f"{tp} and model.attention.kv_heads {kv_heads}: one must divide the other, so that a rank has whole key/value heads; "
            f"change parallel.tp"
        )
    first = cfg.of_block(0).ffn  # dense, or there is no dense one
    if first.kind == "dense" and first.hidden % ranks:
        name = "hidden" if cfg.ffn.kind == "dense" else "dense_hidden"
        raise UserError(f"{tp} does not divide model.ffn.{name} {first.hidden} (remainder {first.hidden % ranks})")
    if -(-vocab // ranks) * (ranks - 1) >= vocab:
        raise UserError(f"{tp} leaves the last rank nothing of model.vocab_size {vocab}: {-(-vocab // ranks)} entries for each rank before")


class Splitter:
    """What replaces the forward passes of a model's parts, and what splits their parameters."""

    def __init__(self, mesh: DeviceMesh, vocab_size: int, **fused):
        self.mesh, self.vocab_size = mesh, vocab_size
        self.group: dist.ProcessGroup = mesh.get_group()
        self.fused = {"group": self.group} | fused
        self.whole_to_split: dict[nn.Parameter, nn.Parameter] = {}  # a parameter of two modules stays one

    def model(self, model: nn.Module) -> None:
        """Split everything in `model`, or in a stage of it, that is shared."""
        blocks = [*model.blocks.items(), *((f"mtp.{i}", head.block) for i, head in enumerate(getattr(model, "mtp", None) or ()))]
        for name, block in blocks:
            if not isinstance(block.attention, Attention):
                kind = type(block.attention).__name__
                raise UserError(f"parallel.tp {self.mesh.size()}: the attention of block {name}, {kind}, cannot be split")
            split = self.latent_attention if isinstance(block.attention, LatentAttention) else self.attention
            split(block.attention)
            if isinstance(block.ffn, SwiGLU | GELU):
                self.feed_forward(block.ffn)
        if model.embedding is not None:
            self.split(model.embedding, "weight", 0)
            model.embedding.forward = partial(self.embed, model.embedding)
        if model.position_embedding is not None:
            model.position_embedding.forward = partial(self.embed_positions, model.position_embedding.forward)
        if model.head is not None:
            self.split(model.head, "weight", 0)
            model.head.forward = partial(self.head, model.head)

    def split(self, module: nn.Module, name: str, dim: int) -> None:
        """Make the parameter a DTensor that is sharded along `dim`; nothing for one that the module does not have."""
        whole = getattr(module, name, None)
        if whole is None:
            return
        if whole not in self.whole_to_split:
            sharded = distribute_tensor(whole.detach(), self.mesh, [Shard(dim)], src_data_rank=None)
            self.whole_to_split[whole] = nn.Parameter(sharded, requires_grad=whole.requires_grad)
        module.register_parameter(name, self.whole_to_split[whole])

    def columns(self, proj: nn.Linear) -> None:
        """Split a projection by what it gives. The narrow side of an adapter stays whole."""
        for name in ("weight", "bias", "lora_b"):
            self.split(proj, name, 0)

    def rows(self, proj: nn.Linear) -> None:
        """Split a projection by what it takes."""
        for name in ("weight", "lora_a"):
            self.split(proj, name, 1)

    def attention(self, attention: Attention) -> None:
        """Split by heads. Key/value heads that are fewer than ranks stay whole, and each rank computes the one that it needs."""
        kv_heads = attention.k_proj.out_features // attention.head_dim
        columns = [attention.q_proj] if kv_heads < self.mesh.size() else [attention.q_proj, attention.k_proj, attention.v_proj]
        for proj in columns:
            self.columns(proj)
        self.rows(attention.out_proj)
        kv_rows = None
        if kv_heads < self.mesh.size():
            head = self.group.rank() * kv_heads // self.mesh.size()
            kv_rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.qkv = partial(self.qkv, attention, kv_rows)
        attention.output = partial(self.attention_output, attention)

    def qkv(self, attention: Attention, kv_rows: slice | None, x: Tensor) -> tuple[Tensor, ...]:
        """x [B,S/t,D] -> queries [B,S,H/t*d], keys and values [B,S,K/t*d], at least one head."""
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return tuple(gather_matmul(x, projections, rows=(None, kv_rows, kv_rows), **self.fused))

    def latent_attention(self, attention: LatentAttention) -> None:
        """Split by heads from the narrow vectors on; what makes these stays whole and sees S/t positions."""
        for proj in (attention.q_up_proj, attention.kv_up_proj):
            self.columns(proj)
        self.rows(attention.out_proj)
        attention.widen = partial(self.widen, attention)
        attention.output = partial(self.attention_output, attention)

    def widen(self, attention: LatentAttention, queries: Tensor, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,S/t,..] each -> queries [B,S,H/t*d], keys with values [B,S,H/t*(nope+dv)], rotated keys [B,S,rope]."""
        (q,) = gather_matmul(queries, [attention.q_up_proj], **self.fused)
        (kv,) = gather_matmul(latent, [attention.kv_up_proj], **self.fused)
        return q, kv, all_gather_sequence(shared, self.group)

    def attention_output(self, attention: Attention, out: Tensor) -> Tensor:
        """[B,H/t,S,d] -> [B,S/t,D]."""
        return self._back(attention.out_proj, out.transpose(1, 2))

    def feed_forward(self, ffn: nn.Module) -> None:
        """Split by the hidden width F."""
        for proj in ffn.expanding():
            self.columns(proj)
        self.rows(ffn.down_proj)
        ffn.forward = partial(self.run_feed_forward, ffn)

    def run_feed_forward(self, ffn: nn.Module, x: Tensor) -> Tensor:
        """[B,S/t,D] -> [B,S/t,D]; in between the order of positions does not matter."""
        hidden = ffn.activate(*gather_matmul(x, ffn.expanding(), ordered=False, **self.fused))
        return self._back(ffn.down_proj, hidden, batch=x.shape[0])

    def _back(self, proj: nn.Linear, x: Tensor, **order: int) -> Tensor:
        """A projection split by rows; its bias is added once, after the sum."""
        out = matmul_scatter(x, proj, **order, **self.fused)
        return out if proj.bias is None else out + local_tensor(proj.bias)

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """Tokens [B,S] -> [B,S/t,D]."""
        embedded = vocab_embedding(tokens, local_tensor(embedding.weight), vocab_size=self.vocab_size, group=self.group)
        return embedded.clone()  # no view, of which FSDP2 warns

    def embed_positions(self, whole, positions: Tensor) -> Tensor:
        """Positions [B or 1,S] -> their learned vectors [B or 1,S/t,D]."""
        return whole(positions.split(local_length(positions.shape[1], self.group), 1)[self.group.rank()])

    def head(self, head: Head, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [B,S/t,D] -> logits [B,S,V]; with targets [B,S] the summed cross-entropy, the same on every rank."""
        weight = local_tensor(head.weight)
        if targets is not None:
            return vocab_cross_entropy(hidden, weight, targets, vocab_size=self.vocab_size, group=self.group, chunk=head.loss_chunk)
        # Ranks hold different numbers of entries, with which fused operators of other devices do not reckon.
        plain = self.fused | {"implementation": "chunked"}
        (logits,) = all_gather_matmul(hidden, [weight.to(hidden.dtype)], **plain)
        return gather_vocabulary(logits, vocab_size=self.vocab_size, group=self.group)


def _refuse(model: nn.Module, args: tuple, kwargs: dict) -> None:
    for name in ("cache", "last"):
        if kwargs.get(name) is not None:
            raise UserError(f"{name}= is not available under parallel.tp, which shares the sequence between ranks; compute all logits")
