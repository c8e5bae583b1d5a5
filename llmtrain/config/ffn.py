"""The kinds of feed-forward branch: dense, and mixtures of experts."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llmtrain.config.base import Section


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


class RouterConfig(Section):
    """How a token's experts are chosen and weighed. Scores are computed in fp32 or higher."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of logits: softmax over all experts (Mixtral, Qwen3), or a sigmoid of each (DeepSeek-V3, Pangu Ultra MoE)."""
    renormalise: bool = True
    """Divide the chosen scores by their sum (Mixtral, Qwen3, DeepSeek-V3)."""
    scale: PositiveFloat = 1.0
    """What the chosen scores are multiplied by in the end."""
    groups: PositiveInt = 1
    """Groups that the experts stand in, in order; a token goes to experts of `top_groups` of them (DeepSeek-V3)."""
    top_groups: PositiveInt = 1
    """Groups that a token may go to: those with the highest sum of their two highest scores."""
    bias_rate: NonNegativeFloat | None = None
    """Balance without a loss (arXiv 2408.15664): scores get a bias per expert, for the choice alone, which moves by this much per step
    towards experts with too few tokens. No bias if not given; 0 keeps one as it is."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906)."""
    force_balance: bool = False
    """Deal tokens out evenly, whatever the scores: for benchmarks."""


class BalanceConfig(Section):
    """The loss against unequal use of experts: weight * sum over experts of f * p, in each group of sequences.

    f is the share of the group's choices that the expert got, times the number of experts; p its mean score (normalised to sum 1). Only p
    has a gradient. A layer's loss is the mean over groups; layers add up (Switch, arXiv 2101.03961; Pangu Ultra MoE, arXiv 2505.04519).
    """

    weight: NonNegativeFloat = 0.01
    """Weight of the loss beside the mean loss of a token."""
    sequences: PositiveInt | Literal["step"] = "step"
    """Size of a group: 1 is the sequence loss of DeepSeek-V3, train.micro_batch what is usual in frameworks, the sequences that an EP
    group computes at once Pangu Ultra MoE's, `step` all of the optimizer step (global batch)."""


class CapacityConfig(Section):
    """Drop what does not fit: each expert takes at most factor * top_k / experts of the tokens of each group of sequences."""

    factor: PositiveFloat = 1.25
    """1 is the even share."""
    sequences: PositiveInt = 1
    """Size of a group, a divisor of train.micro_batch. Of its tokens an expert takes those with the highest probability."""


class MoEConfig(Section):
    """A mixture of experts in place of the dense branch: every token goes to a few of many feed-forward networks."""

    kind: Literal["moe"]  # no default, so that the JSON schema does not take a section without `kind` for this one
    """The feed-forward family."""
    experts: PositiveInt = 8
    """Experts E of every block."""
    top_k: PositiveInt = 2
    """Experts that a token goes to: those with the highest scores, of equal ones the first."""
    hidden: PositiveInt = 1024
    """Width F of one expert's hidden layer."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """`swiglu`: silu(x Wg) * (x Wu) Wd. `gelu`: gelu(x Wu) Wd (tanh form)."""
    bias: bool = False
    """Biases on all projections of the experts, and of the dense layers and shared experts."""
    descend: PositiveInt | None = None
    """BigMac's DCCA (arXiv 2502.16927): rows are projected to this width before they are sent, experts are this wide at both ends, and
    their weighted sum is projected back to the model's width. Rows of the model's width are sent if not given."""
    shared_experts: NonNegativeInt = 0
    """Experts that every token goes to beside the chosen ones, as one network of this many times `hidden`."""
    dense_layers: NonNegativeInt = 0
    """First blocks that have a dense branch instead."""
    dense_hidden: PositiveInt | None = None
    """Width of that dense branch; `hidden` if not given."""
    router: RouterConfig = RouterConfig()
    """How experts are chosen."""
    balance: BalanceConfig | None = None
    """The loss against unequal use of experts; none if not given."""
    capacity: CapacityConfig | None = None
    """Drop tokens beyond a capacity; none are dropped if not given."""

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEConfig":
        router = self.router
        if self.top_k > self.experts:
            raise ValueError(f"model.ffn.top_k {self.top_k} is more than model.ffn.experts {self.experts}")
        if self.experts % router.groups or router.top_groups > router.groups:
            raise ValueError(
                f"model.ffn.router.groups {router.groups} must divide model.ffn.experts {self.experts}, "
                f"and top_groups {router.top_groups} be at most groups"
            )
        reach = router.top_groups * self.experts // router.groups
        if self.top_k > reach:
            raise ValueError(
                f"model.ffn.top_k {self.top_k} is more than the {reach} experts of router.top_groups {router.top_groups} groups"
            )
        return self

    @property
    def shared_hidden(self) -> int:
        """Width of the network of all shared experts; 0 without."""
        return self.shared_experts * self.hidden


FeedForward = Annotated[FFNConfig | MoEConfig, Field(discriminator="kind")]
