"""Multi-token prediction as our model has it, around megatron-core's layers: heads share the model's final norm, output head and embedding.

Imports megatron-core, so it is imported when an engine is built. Shapes there are [S,B,D].
"""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from llmtrain.engine.megatron_modules import Norm, Whole
from llmtrain.engine.megatron_shared import Shared


class Head(nn.Module):
    """block(proj([norm(e); norm(h)])): megatron-core's order of the two, as the weight map has it."""

    def __init__(self, config, spec: ModuleSpec, shared: Shared, layer_number: int):
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.enorm, self.hnorm = Norm(config, size, eps, shared=shared), Norm(config, size, eps, shared=shared)
        self.eh_proj = Whole(config, 2 * size, size)
        self.transformer_layer = build_module(spec, config=config, layer_number=layer_number)

    def forward(self, hidden: Tensor, embedded: Tensor, number: Tensor) -> Tensor:
        """Hidden states and embeddings of the tokens ahead, both [S,B,D], this rank's part of S -> [S,B,D]."""
        joined, _ = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        return self.transformer_layer(joined, number)[0]


class Heads(nn.Module):
    """The heads under the names that megatron-core gives its own."""

    def __init__(self, heads: list[Head]):
        super().__init__()
        self.layers = nn.ModuleList(heads)


class LookingAhead(GPTModel):
    """A last stage with heads: in training gives logits of the next token and of each head, a tuple; else those of the next token alone."""

    def add_heads(self, spec: ModuleSpec, shared: Shared, heads: int) -> None:
        """Put the heads in, and an embedding where the stage is not the first as well."""
        self.shared = shared
        self.mtp = Heads([Head(self.config, spec, shared, 1) for _ in range(heads)])
        self.mtp_process = True
        if not self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=self.config,
                vocab_size=self.vocab_size,
                max_sequence_length=self.max_sequence_length,
                position_embedding_type=self.position_embedding_type,
                tp_group=self.pg_collection.tp,
            )
            weight = self.embedding.word_embeddings.weight
            weight.shared = weight.shared_embedding = True  # out of the norm, and its gradients are added to the first stage's
        self.decoder.final_layernorm.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._residual = given[0]

    def _postprocess(self, hidden_states: Tensor, *, attention_mask: Tensor, **_) -> Tensor | tuple[Tensor, ...]:
        weight = self.embedding.word_embeddings.weight if self.share_embeddings_and_output_weights else None
        found = [self._logits(hidden_states, weight)]
        x = self._residual
        if self.training:
            for head, (tokens, _) in zip(self.mtp.layers, self.shared.micros[int(attention_mask)].ahead):
                x = head(x, self.embedding(input_ids=tokens, position_ids=None), attention_mask)
                found.append(self._logits(self.decoder.final_layernorm(x), weight))
        self._residual = None
        return tuple(found) if self.training else found[0]

    def _logits(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """[S,B,D] -> [B,S,V/t]."""
        return self.output_layer(hidden, weight=weight)[0].transpose(0, 1).contiguous()
