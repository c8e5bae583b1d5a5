"""What loads an openPangu sandwich-norm folder in transformers, which has no class of its own for it.

    from llmtrain.convert.openpangu import register
    register()
    model = AutoModelForCausalLM.from_pretrained(folder)

The block is Pangu Ultra's (arXiv 2504.07866, section 2.2): h + norm(attention(norm(h))), then h + norm(ffn(norm(h))).
"""

from functools import cache
from typing import Any

from llmtrain.errors import UserError


@cache
def register() -> type:
    """Make AutoConfig and AutoModelForCausalLM know folders with model_type PanguEmbedded; returns the model's class.

    Raises UserError if transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UserError("openPangu folders are loaded by transformers, which is missing: pip install llmtrain[hf]") from None
    config, model = _classes()
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    return model


def _classes() -> tuple[type, type]:
    """transformers' Llama with four norms a block."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.llama.configuration_llama import LlamaConfig

    class PanguEmbeddedConfig(LlamaConfig):
        """LlamaConfig with `sandwich_norm` and `bias` (of the attention projections) beside it."""

        model_type = "PanguEmbedded"

        def __post_init__(self, **given: Any) -> None:
            self.sandwich_norm, self.bias = given.pop("sandwich_norm", False), given.pop("bias", True)
            super().__post_init__(**given)
            self.attention_bias = self.bias

    class PanguEmbeddedLayer(llama.LlamaDecoderLayer):
        """A block whose branches are normed before and after."""

        def __init__(self, config: PanguEmbeddedConfig, layer_idx: int):
            super().__init__(config, layer_idx)
            self.pre_mlp_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_mlp_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        def forward(self, hidden_states: Any, **given: Any) -> Any:
            branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
            hidden_states = hidden_states + self.post_attention_layernorm(branch)
            return hidden_states + self.post_mlp_layernorm(self.mlp(self.pre_mlp_layernorm(hidden_states)))

    class PanguEmbeddedForCausalLM(llama.LlamaForCausalLM):
        """The language model; without sandwich_norm it is Llama."""

        config_class = PanguEmbeddedConfig

        def __init__(self, config: PanguEmbeddedConfig):
            super().__init__(config)
            if config.sandwich_norm:
                for index in range(config.num_hidden_layers):
                    self.model.layers[index] = PanguEmbeddedLayer(config, index)
                self.post_init()

    return PanguEmbeddedConfig, PanguEmbeddedForCausalLM
