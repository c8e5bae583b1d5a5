"""The feed-forward branch."""

from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.moe import MoE


class SwiGLU(nn.Module):
    """silu(x Wg) * (x Wu), projected back: [..,D] -> [..,D] (arXiv 2002.05202)."""

    def __init__(self, cfg: ModelConfig, *, ops):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(cfg.hidden, cfg.ffn.hidden, bias=cfg.ffn.bias)
        self.up_proj = nn.Linear(cfg.hidden, cfg.ffn.hidden, bias=cfg.ffn.bias)
        self.down_proj = nn.Linear(cfg.ffn.hidden, cfg.hidden, bias=cfg.ffn.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(*(proj(x) for proj in self.expanding())))

    def expanding(self) -> tuple[nn.Linear, ...]:
        """The projections from D to F, in the order in which `activate` takes what they give."""
        return self.gate_proj, self.up_proj

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..,F], [..,F] -> [..,F]."""
        return self.ops.swiglu(gate, up)


class GELU(nn.Module):
    """gelu(x Wu), projected back: [..,D] -> [..,D] (tanh form, GPT-2)."""

    def __init__(self, cfg: ModelConfig, *, ops):
        super().__init__()
        self.ops = ops
        self.up_proj = nn.Linear(cfg.hidden, cfg.ffn.hidden, bias=cfg.ffn.bias)
        self.down_proj = nn.Linear(cfg.ffn.hidden, cfg.hidden, bias=cfg.ffn.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.up_proj(x)))

    def expanding(self) -> tuple[nn.Linear, ...]:
        """As in SwiGLU."""
        return (self.up_proj,)

    def activate(self, up: Tensor) -> Tensor:
        """[..,F] -> [..,F]."""
        return self.ops.gelu(up)


def build_ffn(cfg: ModelConfig, *, ops) -> nn.Module:
    """The branch that `model.ffn.kind` and `activation` name."""
    if cfg.ffn.kind == "moe":
        return MoE(cfg, ops=ops)
    return (SwiGLU if cfg.ffn.activation == "swiglu" else GELU)(cfg, ops=ops)
