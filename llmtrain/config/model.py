"""The shape of a model. Everything here changes the numbers; nothing here names a device or a mesh."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.config.base import Section


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


class AttentionConfig(Section):
    """Grouped-query attention; `kv_heads` equal to `heads` is multi-head, 1 is multi-query."""

    kind: Literal["gqa"] = "gqa"
    """The attention family."""
    heads: PositiveInt = 8
    """Query heads H."""
    kv_heads: PositiveInt | None = None
    """Key/value heads K; the number of query heads if not given."""
    head_dim: PositiveInt | None = None
    """Width of one head; hidden / heads if not given."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2, GPT)."""
    out_bias: bool = False
    """Bias on the output projection (GPT)."""
    qk_norm: bool = False
    """RMSNorm over the head dim of queries and keys before RoPE (Qwen3)."""
    window: PositiveInt | None = None
    """Sliding window: a query sees this many keys, itself included. Full causal attention if not given."""


class FFNConfig(Section):
    """The dense feed-forward branch."""

    kind: Literal["dense"] = "dense"
    """The feed-forward family; `moe` is a mixture of experts."""
    hidden: PositiveInt = 1024
    """Width F of the hidden layer."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """`swiglu`: silu(x Wg) * (x Wu) Wd. `gelu`: gelu(x Wu) Wd (tanh form)."""
    bias: bool = False
    """Biases on all projections."""


class MoEConfig(Section):
    """A mixture of experts in place of the dense branch: every token goes to a few of many feed-forward networks."""

    kind: Literal["moe"]  # no default, so that the JSON schema does not take a section without `kind` for this one
    """The feed-forward family."""
    experts: PositiveInt = 8
    """Experts E of every block."""
    top_k: PositiveInt = 2
    """Experts that a token goes to: those with the highest router probabilities, of equal ones the first."""
    hidden: PositiveInt = 1024
    """Width F of one expert's hidden layer."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """`swiglu`: silu(x Wg) * (x Wu) Wd. `gelu`: gelu(x Wu) Wd (tanh form)."""
    renormalise: bool = True
    """Divide the chosen probabilities by their sum (Mixtral, Qwen3)."""

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise ValueError(f"model.ffn.top_k {self.top_k} is more than model.ffn.experts {self.experts}")
        return self


FeedForward = Annotated[FFNConfig | MoEConfig, Field(discriminator="kind")]


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
    not read it. Keys beside it must agree with it, but for `init`, `max_seq_len`, `position.base`, `position.scaling` and norm.c_*."""
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
    attention: AttentionConfig = AttentionConfig()
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
        if a.head_dim is None and self.hidden % a.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of attention.heads {a.heads}; set attention.head_dim")
        if a.heads % self.kv_heads:
            raise ValueError(f"attention.heads {a.heads} is not a multiple of attention.kv_heads {a.kv_heads}")
        if self.position.kind == "rope" and self.head_dim % 2:
            raise ValueError(f"RoPE needs an even head dim, attention.head_dim is {self.head_dim}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention.head_dim or self.hidden // self.attention.heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.attention.kv_heads or self.attention.heads
