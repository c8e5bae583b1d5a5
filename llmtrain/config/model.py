"""The shape of a model. Everything here changes the numbers; nothing here names a device or a mesh."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.config.attention import AttentionConfig, AttentionKinds
from llmtrain.config.base import Section
from llmtrain.config.ffn import FeedForward, FFNConfig


class NormConfig(Section):
    """Which normalisation, and where it stands in a block."""

    kind: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """RMSNorm, or LayerNorm with a bias."""
    eps: PositiveFloat = 1e-5
    """Added to the variance."""
    placement: Literal["pre", "sandwich", "depth_scaled_sandwich"] = "pre"
    """`pre`: before each branch. `sandwich`: also after it, before the residual add, gamma 1.
    `depth_scaled_sandwich`: as sandwich with post-norm gamma c / sqrt(layers) at initialisation (Pangu Ultra, eq. 1)."""
    c_attention: PositiveFloat | Literal["auto"] = 0.283
    """c of the norm after attention (Pangu Ultra: 0.283). `auto` measures the branch's output std on real tokens at start."""
    c_ffn: PositiveFloat | Literal["auto"] = 0.432
    """c of the norm after the feed-forward branch (Pangu Ultra: 0.432). `auto` measures it on real tokens at start."""


class MTPConfig(Section):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): heads that predict tokens after the next one, in training."""

    heads: NonNegativeInt = 0
    """Heads, each a block of its own; head n predicts the token n + 1 places ahead. 0 is none."""
    loss_weight: NonNegativeFloat = 0.3
    """Weight of the mean of their losses beside the loss of the next token."""


class YarnConfig(Section):
    """RoPE scaled to a longer context by YaRN (arXiv 2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    """YaRN: interpolates low frequencies, keeps high ones, scales attention by 0.1 ln(factor) + 1."""
    factor: PositiveFloat
    """New context / original context."""
    original_seq_len: PositiveInt
    """Context the model was trained on before scaling."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies with more rotations than this over the original context are kept."""
    beta_slow: PositiveFloat = 1.0
    """Frequencies with fewer rotations than this are fully interpolated."""
    attention_factor: PositiveFloat | None = None
    """What cos and sin are multiplied by; 0.1 ln(factor) + 1 if not given."""


class NTKConfig(Section):
    """RoPE scaled by raising its base: base * factor ** (dim / (dim - 2))."""

    kind: Literal["ntk"] = "ntk"
    """NTK-aware scaling."""
    factor: PositiveFloat
    """New context / original context."""


class Llama3RopeConfig(Section):
    """RoPE scaled piecewise by wavelength, as Llama 3.1 does."""

    kind: Literal["llama3"] = "llama3"
    """Llama 3.1's rule."""
    factor: PositiveFloat = 8.0
    """Long wavelengths are stretched by this."""
    low_freq_factor: PositiveFloat = 1.0
    """original_seq_len / this is the wavelength above which stretching is full."""
    high_freq_factor: PositiveFloat = 4.0
    """original_seq_len / this is the wavelength below which nothing changes."""
    original_seq_len: PositiveInt = 8192
    """Context the model was trained on before scaling."""


RopeScaling = Annotated[YarnConfig | NTKConfig | Llama3RopeConfig, Field(discriminator="kind")]


class PositionConfig(Section):
    """How a token knows its place."""

    kind: Literal["rope", "learned"] = "rope"
    """Rotary embedding on queries and keys, or a learned vector added to the token embedding."""
    base: PositiveFloat = 10_000.0
    """RoPE base (theta)."""
    scaling: RopeScaling | None = None
    """How RoPE is stretched to a longer context."""


class InitConfig(Section):
    """Initial weights; drawn per (seed, parameter name, element), so the mesh does not change them."""

    kind: Literal["normal", "small", "tiny"] = "normal"
    """`normal`: std for every matrix. `small`: sqrt(2 / (5 d)), residual outputs sqrt(2 / (5 d L)).
    `tiny`: sqrt(1 / (2 d L)) everywhere, embedding 0.5 (Pangu Ultra's TinyInit)."""
    std: PositiveFloat = 0.02
    """Standard deviation of kind `normal`; residual outputs are divided by sqrt(2 L)."""
    embedding_std: PositiveFloat | None = None
    """Standard deviation of the token embedding; by kind if not given (normal: std, small: sqrt(2 / (5 d)), tiny: 0.5)."""


class ModelConfig(Section):
    """A decoder-only transformer. `preset: NAME` starts from a published model; other keys then override it."""

    preset: str | None = None
    """Name of a published model (`llmtrain config show --presets` lists them); keys beside it override its values."""
    pretrained: str | None = None
    """Start from this model's weights and shape: a Hugging Face folder, or a run folder or checkpoint of llmtrain. A run that resumes does
    not read it. Keys beside it must agree with it, but for `init`, `max_seq_len`, `position.base`, `position.scaling`, norm.c_*, and how
    experts are trained (`ffn.balance`, `ffn.capacity`, a bias in routers and its rate, z_loss)."""
    family: str = "transformer"
    """Model family; `transformer` is built in, a plugin may register others."""
    vocab_size: PositiveInt | None = None
    """Vocabulary V; the tokenizer's size if not given."""
    layers: PositiveInt = 6
    """Number of blocks L."""
    hidden: PositiveInt = 512
    """Model width D."""
    max_seq_len: PositiveInt = 4096
    """Longest sequence the model promises to serve; the number of learned positions."""
    attention: AttentionKinds = AttentionConfig()
    """Attention of every block."""
    ffn: FeedForward = FFNConfig()
    """Feed-forward branch of every block."""
    norm: NormConfig = NormConfig()
    """Normalisation."""
    position: PositionConfig = PositionConfig()
    """Position information."""
    init: InitConfig = InitConfig()
    """Initial weights."""
    tie_embeddings: bool = False
    """The output head shares the token embedding."""
    mtp: MTPConfig = MTPConfig()
    """Multi-token prediction."""

    @field_validator("ffn", mode="before")
    @classmethod
    def _dense_unless_said(cls, value: Any) -> Any:
        return {"kind": "dense", **value} if isinstance(value, dict) else value

    @field_validator("attention", mode="before")
    @classmethod
    def _grouped_unless_said(cls, value: Any) -> Any:
        return {"kind": "gqa", **value} if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        from llmtrain.config.pretrained import expand_model
        from llmtrain.config.published import expand_preset

        return expand_preset(expand_model(values))

    @model_validator(mode="after")
    def _fits_pretrained(self) -> "ModelConfig":
        # A run's own config.yaml has every field set, and must be readable when the pretrained folder is gone.
        if self.pretrained is not None and not ModelConfig.model_fields.keys() <= self.model_fields_set:
            from llmtrain.config.pretrained import conflicts

            if problems := conflicts(self):
                raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        a = self.attention
        if a.kind == "gqa" and a.head_dim is None and self.hidden % a.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of attention.heads {a.heads}; set attention.head_dim")
        if a.heads % self.kv_heads:
            raise ValueError(f"attention.heads {a.heads} is not a multiple of attention.kv_heads {a.kv_heads}")
        if self.position.kind == "rope" and self.rope_dim % 2:
            name = "rope_dim" if a.kind == "mla" else "head_dim"
            raise ValueError(f"RoPE needs an even head dim, attention.{name} is {self.rope_dim}")
        if a.kind == "mla" and self.position.kind != "rope":
            raise ValueError("attention.kind mla has a part of each head for RoPE; position.kind must be rope")
        if self.ffn.kind == "moe" and self.ffn.dense_layers > self.layers:
            raise ValueError(f"ffn.dense_layers {self.ffn.dense_layers} is more than layers {self.layers}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one head's queries and keys."""
        if self.attention.kind == "mla":
            return self.attention.nope_dim + self.attention.rope_dim
        return self.attention.head_dim or self.hidden // self.attention.heads

    @property
    def value_head_dim(self) -> int:
        """Width of one head's values."""
        return self.attention.value_dim if self.attention.kind == "mla" else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Numbers of one head that RoPE rotates."""
        return self.attention.rope_dim if self.attention.kind == "mla" else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads K that attention sees."""
        return self.attention.heads if self.attention.kind == "mla" else self.attention.kv_heads or self.attention.heads

    def of_block(self, index: int) -> "ModelConfig":
        """The configuration as block `index` has it: `ffn` is dense in the first `ffn.dense_layers` blocks of a mixture of experts."""
        ffn = self.ffn
        if ffn.kind != "moe" or index >= ffn.dense_layers:
            return self
        dense = FFNConfig(hidden=ffn.dense_hidden or ffn.hidden, activation=ffn.activation, bias=ffn.bias)
        return self.model_copy(update={"ffn": dense})

    @property
    def expert_layers(self) -> int:
        """Blocks with a mixture of experts, heads of multi-token prediction not counted."""
        return self.layers - self.ffn.dense_layers if self.ffn.kind == "moe" else 0
