"""Multi-token prediction: heads that predict tokens after the next one (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.norm import build_norm


class MTPHead(nn.Module):
    """One head: block(proj([hidden_norm(h); embedding_norm(e)])), [B,S,D] -> [B,S,D] (equations 21 and 22).

    h is what the last block, or the head before this one, gave: the residual stream before the final norm. e is the embedding of the
    token that the position before it predicts. Final norm, output head and embedding are the model's own; learned positions are in h
    already and are not added to e.
    """

    def __init__(self, cfg: ModelConfig, *, ops, block: type[nn.Module]):
        super().__init__()
        self.hidden_norm = build_norm(cfg.norm, cfg.hidden, ops=ops)
        self.embedding_norm = build_norm(cfg.norm, cfg.hidden, ops=ops)
        self.proj = nn.Linear(2 * cfg.hidden, cfg.hidden, bias=False)
        self.block = block(cfg, ops=ops)

    def forward(self, x: Tensor, embedded: Tensor, *, rope: tuple[Tensor, Tensor] | None, mask) -> Tensor:
        """x [B,S,D] and the embedding [B,S,D] of the tokens ahead; rope and mask as in Block.forward."""
        both = torch.cat((self.hidden_norm(x), self.embedding_norm(embedded)), -1)  # [B,S,2D]
        return self.block(self.proj(both), rope=rope, mask=mask)


def build_mtp(cfg: ModelConfig, *, ops, block: type[nn.Module]) -> nn.ModuleList | None:
    """The heads that `model.mtp.heads` asks for; None without."""
    heads = [MTPHead(cfg, ops=ops, block=block) for _ in range(cfg.mtp.heads)]
    return nn.ModuleList(heads) if heads else None
