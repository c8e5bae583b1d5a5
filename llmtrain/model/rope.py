"""Rotary position embedding (arXiv 2104.09864) and its stretching to longer contexts."""

import math

import torch
from torch import Tensor, nn

from llmtrain.config.model import Llama3RopeConfig, NTKConfig, PositionConfig, RopeScaling, YarnConfig


def inverse_frequencies(base: float, head_dim: int, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each rotated pair, [head_dim / 2] in fp64 on the CPU."""
    if isinstance(scaling, NTKConfig):
        base = ntk_base(base, head_dim, scaling.factor)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    plain = base**-exponents
    if isinstance(scaling, YarnConfig):
        return _yarn(plain, base, head_dim, scaling)
    if isinstance(scaling, Llama3RopeConfig):
        return _llama3(plain, scaling)
    return plain


def ntk_base(base: float, head_dim: int, factor: float) -> float:
    """The raised base of NTK-aware scaling: the slowest pair turns `factor` times slower, the fastest as before."""
    return base * factor ** (head_dim / (head_dim - 2))


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by (YaRN, arXiv 2309.00071 eq. 22, unless the section gives it); 1 for the other rules."""
    if isinstance(scaling, YarnConfig) and scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, YarnConfig) and scaling.factor > 1:
        return 0.1 * math.log(scaling.factor) + 1.0
    return 1.0


def _yarn(plain: Tensor, base: float, head_dim: int, cfg: YarnConfig) -> Tensor:
    # Pair i turns original_seq_len * plain[i] / 2 pi times over the original context; solved for i at the two betas.
    def pair_with(rotations: float) -> float:
        return head_dim * math.log(cfg.original_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_with(cfg.beta_slow)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    interpolated = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)  # 0 keeps the frequency, 1 divides it by factor
    return plain * (1 - interpolated) + plain / cfg.factor * interpolated


def _llama3(plain: Tensor, cfg: Llama3RopeConfig) -> Tensor:
    rotations = cfg.original_seq_len * plain / (2 * math.pi)  # original_seq_len / wavelength
    kept = ((rotations - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)).clamp(0, 1)
    return plain * kept + plain / cfg.factor * (1 - kept)


class Rope(nn.Module):
    """cos and sin of every position, computed once per forward pass and shared by the blocks.

    Holds no parameter and no buffer: the frequencies follow from the configuration, so a model that is built on meta loses
    nothing, and `base` may change between steps.
    """

    def __init__(self, cfg: PositionConfig, head_dim: int):
        super().__init__()
        self.base, self.scaling, self.head_dim = cfg.base, cfg.scaling, head_dim
        self._frequencies: dict[tuple, Tensor] = {}

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B,S] -> cos, sin [B,1,S,d] in `dtype`; angles in fp32, in fp64 if `dtype` is."""
        angles = self.angles(positions, torch.float64 if dtype == torch.float64 else torch.float32)
        factor = attention_factor(self.scaling)
        cos, sin = ((t if factor == 1.0 else t * factor).to(dtype) for t in (angles.cos(), angles.sin()))
        return torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions [B,S] -> the angle of each rotated pair [B,S,d/2] in `dtype`."""
        return positions[..., None].to(dtype) * self._on(positions.device, dtype)

    def _on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (self.base, device, dtype)
        if key not in self._frequencies:
            self._frequencies = {key: inverse_frequencies(self.base, self.head_dim, self.scaling).to(device, dtype)}
        return self._frequencies[key]
