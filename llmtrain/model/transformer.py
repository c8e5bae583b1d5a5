"""The decoder-only transformer: embedding, blocks, final norm, head."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.block import Block
from llmtrain.model.cache import KVCache
from llmtrain.model.family import register_family
from llmtrain.model.head import Head
from llmtrain.model.mtp import build_mtp
from llmtrain.model.norm import build_norm
from llmtrain.model.rope import Rope


@register_family("transformer")
class Transformer(nn.Module):
    """A decoder. Computes in the dtype of its parameters; holds no collective and no device name.

    Parameters are left empty: `initialise` fills them after the model is on its device. A family that differs in its blocks alone
    derives from this and sets `block`. A pipeline stage is one with parts missing (`cut`): `embedding`, `position_embedding`,
    `final_norm`, `head` and `mtp` may be None, and `blocks` holds some blocks under their numbers in the whole model.
    Raises ValueError if `model.vocab_size` is not set.
    """

    block: ClassVar[type[Block]] = Block

    def __init__(self, cfg: ModelConfig, ops, loss_chunk: int | None):
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("model.vocab_size is not set; give it, or give tokenizer.path so that it is read from the tokenizer")
        self.cfg = cfg
        self.first_stage = self.last_stage = True
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.hidden, _weight=torch.empty(cfg.vocab_size, cfg.hidden))
        learned = cfg.position.kind == "learned"
        self.position_embedding = _positions(cfg) if learned else None
        self.rope = None if learned else Rope(cfg.position, cfg.rope_dim)
        self.blocks = nn.ModuleDict({str(i): self.block(cfg.of_block(i), ops=ops) for i in range(cfg.layers)})
        self.final_norm = build_norm(cfg.norm, cfg.hidden, ops=ops)
        self.head = Head(cfg.vocab_size, cfg.hidden, ops=ops, loss_chunk=loss_chunk)
        self.mtp = build_mtp(cfg, ops=ops, block=self.block)
        self._tie()

    def forward(
        self,
        x: Tensor,
        *,
        mask,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        ahead: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> dict[str, Tensor]:
        """One pass over tokens [B,S] (int64); on a stage that is not the first, over the hidden states [B,S',D] of the one before it.

        `mask` is a Mask; `positions` [B or 1,S], counted on from the cache if not given. With `targets` [B,S] (-100 is none)
        returns {"ce_sum": summed cross-entropy}, else {"logits": [B,S,V]}, if `last` is given of that many last positions alone (0 fills
        a cache and no more); a stage that is not the last returns {"hidden": [B,S',D]}. A `cache` takes causal masks without documents.
        `rope` is what `rotation` gave for the same positions, where several stages share it. S' may be a part of S that was cut from
        outside; positions and rope are those of the whole S.

        `ahead` holds per head of multi-token prediction its tokens and targets, each [B,S] (llmtrain.data.shifted). With it the result also
        has "mtp_ce_sum", the cross-entropy of all heads summed over their targets, and "mtp_weight", loss_weight / heads; without it,
        as in evaluation and generation, the heads do not run.
        """
        mask = self._mask(mask, cache)
        if positions is None and self.first_stage:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        if self.first_stage:
            x = self.embed(x, positions)
        if rope is None:
            rope = self.rotation(positions, x.dtype)
        for name, block in self.blocks.items():
            x = block(x, rope=rope, mask=mask, cache=cache.layer(name) if cache is not None else None)
        if not self.last_stage:
            return {"hidden": x}
        extra = self._look_ahead(x, ahead, rope=rope, mask=mask) if ahead else {}
        x = self.final_norm(x if last is None else x[:, x.shape[1] - last :])
        return ({"logits": self.head(x)} if targets is None else {"ce_sum": self.head(x, targets)}) | extra

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [B,S] and positions [B or 1,S] -> the residual stream [B,S,D] before the first block."""
        x = self.embedding(tokens)
        return x if self.position_embedding is None else x + self.position_embedding(positions)

    def rotation(self, positions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """RoPE's (cos, sin), each [B or 1,1,S,d] in `dtype`, at positions [B or 1,S]; None for a model without it."""
        if self.rope is None:
            return None
        if positions is None:
            raise ValueError("a stage that is not the first needs `positions` or `rope`: its input may be a part of the sequence")
        return self.rope(positions, dtype)

    def _look_ahead(self, x: Tensor, ahead: Sequence[tuple[Tensor, Tensor]], **block) -> dict[str, Tensor | float]:
        heads = self.cfg.mtp.heads
        if len(ahead) != heads:
            raise ValueError(f"`ahead` holds {len(ahead)} pairs of tokens and targets, but model.mtp.heads is {heads}")
        sums = []
        for head, (tokens, targets) in zip(self.mtp, ahead):
            x = head(x, self.embedding(tokens), **block)
            sums.append(self.head(self.final_norm(x), targets))
        return {"mtp_ce_sum": sum(sums[1:], sums[0]), "mtp_weight": self.cfg.mtp.loss_weight / heads}

    def set_rope_base(self, base: float) -> None:
        """Use another RoPE base from the next forward pass on; no parameter changes."""
        if self.rope is None:
            raise ValueError(f"rope_base {base} was given but model.position.kind is 'learned'; only 'rope' has a base")
        self.rope.base = base

    def _mask(self, mask, cache: KVCache | None):
        if cache is not None and mask.documents is not None:
            raise ValueError("a KV cache holds one document per row; the mask must have documents=None")
        window = self.cfg.attention.window
        return mask if window is None else mask.windowed(window)

    def _tie(self) -> None:
        if self.cfg.tie_embeddings and self.head is not None and self.head.weight is not self.embedding.weight:
            self.head.weight = self.embedding.weight

    def _apply(self, fn, recurse=True):
        # to_empty() and to() replace a parameter per module that holds it, which would untie the head.
        super()._apply(fn, recurse)
        self._tie()
        return self


def cut(model: Transformer, *, blocks: range, first: bool, last: bool) -> None:
    """Drop, in place, what a pipeline stage with the blocks of these numbers does not hold; names do not change.

    `first` keeps the embeddings, `last` the final norm, the head and the heads of multi-token prediction. A last stage keeps `embedding`
    as well if it is tied to the head, or if there are such heads, which embed the tokens ahead.
    """
    model.first_stage, model.last_stage = first, last
    for name in [name for name in model.blocks if int(name) not in blocks]:
        del model.blocks[name]
    if not first:
        model.position_embedding = None
    if not (first or (last and (model.cfg.tie_embeddings or model.mtp is not None))):
        model.embedding = None
    if not last:
        model.final_norm = model.head = model.mtp = None


def _positions(cfg: ModelConfig) -> nn.Embedding:
    return nn.Embedding(cfg.max_seq_len, cfg.hidden, _weight=torch.empty(cfg.max_seq_len, cfg.hidden))
