"""The dense feed-forward branch."""

from torch import Tensor, nn

from llmtrain.config.ffn import FFNConfig, MoEConfig


class SwiGLU(nn.Module):
    """silu(x Wg) * (x Wu), projected back: [..,D] -> [..,D] (arXiv 2002.05202)."""

    def __init__(self, hidden: int, width: int, *, bias: bool, ops):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

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

    def __init__(self, hidden: int, width: int, *, bias: bool, ops):
        super().__init__()
        self.ops = ops
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.up_proj(x)))

    def expanding(self) -> tuple[nn.Linear, ...]:
        """As in SwiGLU."""
        return (self.up_proj,)

    def activate(self, up: Tensor) -> Tensor:
        """[..,F] -> [..,F]."""
        return self.ops.gelu(up)


def build_dense(ffn: FFNConfig | MoEConfig, hidden: int, *, width: int | None = None, ops) -> nn.Module:
    """The dense network of `ffn.activation`, D = `hidden` wide outside and `width` (ffn.hidden if not given) inside."""
    return (SwiGLU if ffn.activation == "swiglu" else GELU)(hidden, width or ffn.hidden, bias=ffn.bias, ops=ops)
