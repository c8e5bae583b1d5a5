"""One transformer block."""

from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.attention import Attention
from llmtrain.model.cache import LayerCache
from llmtrain.model.ffn import build_dense
from llmtrain.model.mla import LatentAttention
from llmtrain.model.moe import MoE
from llmtrain.model.norm import build_norm


class Block(nn.Module):
    """Attention and feed-forward branches, each added to the residual stream [B,S,D].

    pre: h + F(norm(h)); sandwich: h + norm(F(norm(h))), the post norm standing on the branch before the residual add
    (Pangu Ultra, arXiv 2504.07866). What comes before and after the attention op are methods of their own: torch.compile takes them whole.
    """

    def __init__(self, cfg: ModelConfig, *, ops):
        super().__init__()
        sandwich = cfg.norm.placement != "pre"
        self.attention_norm = build_norm(cfg.norm, cfg.hidden, ops=ops)
        self.attention = (LatentAttention if cfg.attention.kind == "mla" else Attention)(cfg, ops=ops)
        self.post_attention_norm = build_norm(cfg.norm, cfg.hidden, ops=ops) if sandwich else None
        self.ffn_norm = build_norm(cfg.norm, cfg.hidden, ops=ops)
        self.ffn = MoE(cfg, ops=ops) if cfg.ffn.kind == "moe" else build_dense(cfg.ffn, cfg.hidden, ops=ops)
        self.post_ffn_norm = build_norm(cfg.norm, cfg.hidden, ops=ops) if sandwich else None

    def before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,D] -> q [B,H,S,d], k and v [B,K,S,d]."""
        return self.attention.project(self.attention_norm(x), rope=rope)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B,S,D] plus its attention branch, of which `attended` [B,H,S,d] is the op's output, plus the feed-forward branch."""
        branch = self.attention.output(attended)
        branch = branch if self.post_attention_norm is None else self.post_attention_norm(branch)
        normed, x = self.ffn_norm(branch, residual=x)  # one kernel may add and normalise
        branch = self.ffn(normed)
        return x + (branch if self.post_ffn_norm is None else self.post_ffn_norm(branch))

    def forward(self, x: Tensor, *, rope: tuple[Tensor, Tensor] | None, mask, cache: LayerCache | None = None) -> Tensor:
        """[B,S,D] -> [B,S,D]; arguments as in Attention.forward."""
        attended = self.attention.attend(*self.before_attention(x, rope), mask=mask, cache=cache)
        return self.after_attention(x, attended)
