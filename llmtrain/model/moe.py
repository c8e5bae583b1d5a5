"""A mixture of experts in the place of the dense feed-forward branch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.experts import Experts, LocalDispatcher, RoutedExperts


class Router(nn.Module):
    """Which experts each token goes to, and with what weight: x [N,D] -> probs [N,k], ids [N,k] (int64).

    Softmax over all experts, then the k most probable (Mixtral, arXiv 2401.04088), computed in fp32 or higher whatever x has. Of equally
    probable experts the one with the lowest id comes first, on every device.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.ffn.experts, cfg.hidden))
        self.top_k, self.renormalise = cfg.ffn.top_k, cfg.ffn.renormalise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores = F.linear(x.to(precise), self.weight.to(precise)).softmax(-1)  # [N,E]
        ids = highest(scores.detach(), self.top_k)
        probs = scores.gather(-1, ids)
        return (probs / probs.sum(-1, keepdim=True) if self.renormalise else probs), ids


def highest(scores: Tensor, k: int) -> Tensor:
    """Columns of the k highest scores of each row, [N,E] in fp32 or fp64 -> [N,k] int64, highest first, of equal ones the first column.

    topk leaves open which of equal ones it takes. In fp32 it gets whole numbers that put the column behind the score (four to five times
    faster than sorting all of them).
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0 a 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats run backwards
    columns = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered * 2**32 + columns).topk(k, dim=-1).indices


class MoE(nn.Module):
    """Router and routed experts: [..,D] -> [..,D].

    `routed` is the seam of `RoutedExperts`: what moves tokens between ranks, or a fused implementation, is put in its place. It is no
    submodule, so the experts' parameters are this module's `experts.*`.
    """

    def __init__(self, cfg: ModelConfig, *, ops):
        super().__init__()
        ffn = cfg.ffn
        self.router = Router(cfg)
        self.experts = Experts(ffn.experts, cfg.hidden, ffn.hidden, ops=ops, activation=ffn.activation)
        self.routed = RoutedExperts(self.experts, LocalDispatcher(ffn.experts, ops))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # [N,D]
        return self.routed(rows, *self.router(rows)).view_as(x)
