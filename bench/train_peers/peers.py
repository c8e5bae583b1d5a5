"""HF transformers, litgpt and torchtitan, each as its own documentation trains it on one device, with the same optimizer."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train_peers import shape as s


@dataclass
class Peer:
    """A model, and how to get its mean loss from (tokens, targets); a step is autocast, backward, clip, fused AdamW."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list
    autocast: bool
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def step(self, index: int) -> float:
        """One optimizer step on batch `index`; returns its loss."""
        tokens, targets = self.batches[index % len(self.batches)]
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def hf(shape: s.Shape, *, compiled: bool) -> tuple[nn.Module, Callable]:
    """LlamaForCausalLM with SDPA and its own loss; the targets are given as they are (`shift_labels`)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.seq,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    if compiled:
        model.compile(dynamic=False)
    return model, lambda tokens, targets: model(input_ids=tokens, labels=targets, shift_labels=targets).loss


def litgpt(shape: s.Shape, *, compiled: bool, chunk: int) -> tuple[nn.Module, Callable]:
    """litgpt's GPT and its chunked_cross_entropy; its pretraining uses chunks of 128 tokens, 0 does not chunk."""
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        name="llama",
        block_size=shape.seq,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_query_groups=shape.heads,
        n_embd=shape.dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape.ffn,
        shared_attention_norm=False,
    )
    model = GPT(config)
    run = torch.compile(model, dynamic=False) if compiled else model
    return model, lambda tokens, targets: chunked_cross_entropy(run(tokens), targets, chunk_size=chunk)


def titan(shape: s.Shape, *, compiled: bool, chunks: int) -> tuple[nn.Module, Callable]:
    """torchtitan's Llama 3 and its loss; its own configurations use 8 chunks, 0 takes its plain loss.

    As shipped it refuses SDPA for language models, and what it allows (flex, varlen) has no backward on a CPU: its own
    ScaledDotProductAttention module is put in.
    """
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig

    model = _titan_model(shape)
    compile_config = CompileConfig(enable=compiled)
    if compiled:
        from torchtitan.distributed import ParallelDims
        from torchtitan.distributed.compile import apply_compile

        alone = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
        apply_compile(model, compile_config=compile_config, parallel_dims=alone)
    if chunks:
        loss = ChunkedLossWrapper.Config(num_chunks=chunks).build(compile_config=compile_config)
        loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    else:
        loss = CrossEntropyLoss.Config().build(compile_config=compile_config)
    valid = torch.tensor(float(shape.tokens))
    return model, lambda tokens, targets: loss(model(tokens), targets, valid)[0]


def _titan_model(shape: s.Shape) -> nn.Module:
    import torchtitan.models.llama3 as llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    llama3.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
    layers = llama3._build_llama3_layers(
        n_layers=shape.layers,
        dim=shape.dim,
        n_heads=shape.heads,
        hidden_dim=shape.ffn,
        rope=llama3.ComplexRoPE.Config(dim=shape.dim // shape.heads, max_seq_len=shape.seq, theta=10000, scaling="none"),
        attn_backend="sdpa",
    )
    config = llama3.Llama3Model.Config(
        dim=shape.dim,
        vocab_size=shape.vocab,
        tok_embeddings=llama3.Embedding.Config(num_embeddings=shape.vocab, embedding_dim=shape.dim, param_init=llama3._EMBEDDING_INIT),
        norm=llama3.RMSNorm.Config(normalized_shape=shape.dim, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(in_features=shape.dim, out_features=shape.vocab, param_init=llama3._output_linear_init(shape.dim)),
        layers=layers,
    )
    model = config.build()
    model.init_states()
    return model


PEERS: dict[str, Callable] = {
    "hf": hf,
    "litgpt": lambda shape, compiled: litgpt(shape, compiled=compiled, chunk=0),
    "litgpt-chunked": lambda shape, compiled: litgpt(shape, compiled=compiled, chunk=128),
    "titan": lambda shape, compiled: titan(shape, compiled=compiled, chunks=0),
    "titan-chunked": lambda shape, compiled: titan(shape, compiled=compiled, chunks=8),
}


def build(name: str, shape: s.Shape, *, dtype: str, compiled: bool) -> Peer:
    """The peer `name`, with parameters in fp32; `dtype` bf16 is autocast."""
    model, loss = PEERS[name](shape, compiled=compiled)
    s.same_init(model)
    return Peer(model, loss, s.batches(shape), autocast=dtype == "bf16", optimizer=s.fused_adamw(model))
