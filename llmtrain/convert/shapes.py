"""Names and shapes of the parameters that a model section describes, as far as Hugging Face families know them."""

from llmtrain.config.model import ModelConfig


def keeps_format(name: str) -> bool:
    """Whether the canonical parameter stays in its own number format when weights are stored in another: a router's bias, which is
    compared with scores and moves by small steps."""
    return name.endswith("router.bias")


def canonical_names(cfg: ModelConfig) -> list[str]:
    """Every parameter of a model that has a Hugging Face family, and the biases of its routers."""
    return list(canonical_shapes(cfg))


def canonical_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of `canonical_names`; vocab_size must be set."""
    table, norm = (cfg.vocab_size, cfg.hidden), (cfg.hidden,)
    shapes = {"embedding.weight": table, "final_norm.weight": norm}
    for layer in range(cfg.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(cfg.of_block(layer)).items()}
    return shapes | ({} if cfg.tie_embeddings else {"head.weight": table})


def _block_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, a = cfg.hidden, cfg.attention
    norms = ["attention_norm", "ffn_norm"] + ["post_attention_norm", "post_ffn_norm"] * (cfg.norm.placement != "pre")
    attention = _latent_shapes(cfg) if a.kind == "mla" else _grouped_shapes(cfg)
    ffn = _expert_shapes(cfg) if cfg.ffn.kind == "moe" else _network("ffn", d, cfg.ffn.hidden, bias=cfg.ffn.bias)
    return attention | ffn | {f"{norm}.weight": (d,) for norm in norms}


def _grouped_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    a, d, q, kv = cfg.attention, cfg.hidden, cfg.attention.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    widths = {"attention.q_proj": q, "attention.k_proj": kv, "attention.v_proj": kv}
    shapes = {f"{name}.weight": (width, d) for name, width in widths.items()} | {"attention.out_proj.weight": (d, q)}
    if a.qkv_bias:
        shapes |= {f"{name}.bias": (width,) for name, width in widths.items()}
    if a.out_bias:
        shapes["attention.out_proj.bias"] = (d,)
    return shapes | ({f"attention.{name}.weight": (cfg.head_dim,) for name in ("q_norm", "k_norm")} if a.qk_norm else {})


def _latent_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    a, d = cfg.attention, cfg.hidden
    shapes = {
        "q_up_proj": (a.heads * cfg.head_dim, a.query_rank or d),
        "kv_down_proj": (a.kv_rank + a.rope_dim, d),
        "kv_norm": (a.kv_rank,),
        "kv_up_proj": (a.heads * (a.nope_dim + a.value_dim), a.kv_rank),
        "out_proj": (d, a.heads * a.value_dim),
    }
    if a.query_rank is not None:
        shapes |= {"q_down_proj": (a.query_rank, d), "q_norm": (a.query_rank,)}
    return {f"attention.{name}.weight": shape for name, shape in shapes.items()}


def _network(name: str, outside: int, inside: int, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (inside, outside), "up_proj": (inside, outside), "down_proj": (outside, inside)}
    biases = {f"{name}.{proj}.bias": shape[:1] for proj, shape in shapes.items()} if bias else {}
    return {f"{name}.{proj}.weight": shape for proj, shape in shapes.items()} | biases


def _expert_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    ffn, d = cfg.ffn, cfg.hidden
    into, out = (ffn.experts, d, ffn.hidden), (ffn.experts, ffn.hidden, d)
    shapes = {"ffn.experts.gate_proj": into, "ffn.experts.up_proj": into, "ffn.experts.down_proj": out}
    bias = {} if ffn.router.bias_rate is None else {"ffn.router.bias": (ffn.experts,)}
    shared = _network("ffn.shared", d, ffn.shared_hidden) if ffn.shared_experts else {}
    return {"ffn.router.weight": (ffn.experts, d)} | bias | shapes | shared
