"""A tiny unquantised GGUF file of a Llama, written with the gguf package from a transformers model."""

from pathlib import Path

import numpy as np

_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def write(model, path: Path, *, architecture: str = "llama", rope_freqs: bool = False) -> Path:
    """`model` (LlamaForCausalLM) as GGUF; `rope_freqs` adds the tensor by which llama.cpp stretches RoPE."""
    import gguf

    config = model.config
    out = gguf.GGUFWriter(path, architecture)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                values = _interleaved(values, heads)
        out.add_tensor(_name(name), np.ascontiguousarray(values))
    if rope_freqs:
        out.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (x1.., x2..) to pairs (x1, x2), ..., the order in which llama.cpp rotates."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, module = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_BLOCK[module.removesuffix('.weight')]}.weight"
