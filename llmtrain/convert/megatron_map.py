"""Canonical parameters and megatron-core's: one invertible map, for weights, gradients and moments alike.

Megatron joins several matrices in one and cuts what it has joined, so a rank's part of its tensor is the join of that rank's parts of ours:
`split` and `join` serve whole tensors and parts alike. Names are those of layers without Transformer Engine, with whole-model numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig


@dataclass(frozen=True)
class Part:
    """A canonical parameter, or one expert's matrix of a stack, inside one of Megatron's."""

    name: str
    size: int
    """Of the whole parameter along its first dim; of an expert's matrix, along the first dim that it has in Megatron."""
    dim: int | None = None
    """Which dim of the canonical matrix tensor parallelism cuts; None if every rank holds all of it."""
    expert: int | None = None
    """Its place in the stack."""


@dataclass(frozen=True)
class Entry:
    """One of Megatron's parameters."""

    name: str
    parts: tuple[Part, ...]
    heads: tuple[int, ...] = ()
    """Rows of each part that stand together, again and again: queries, keys and values of one group; and so on."""
    pairs: tuple[int, int] | None = None
    """(plain, rotated) rows of a head, or of a narrow vector, whose rotated pairs stand beside each other here."""
    swapped: bool = False
    """Whether the halves of its columns stand the other way round."""
    transposed: bool = False
    """Whether an expert's matrix is the transpose of ours."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The parts, in the order of `parts`, out of Megatron's tensor or a rank's part of it. Views where no row moves."""
        tensor = _swap(tensor) if self.swapped else tensor
        rows = self._rows(len(tensor))
        tensor = tensor if rows is None else tensor[rows.to(tensor.device)]
        parts = tensor.split(self._sizes(len(tensor)))
        return [part.t() if self.transposed and part.ndim == 2 else part for part in parts]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor out of the parts: the inverse of `split`."""
        parts = [part.t() if self.transposed and part.ndim == 2 else part for part in parts]
        tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        rows = self._rows(len(tensor))
        if rows is not None:
            tensor = torch.empty_like(tensor).index_copy_(0, rows.to(tensor.device), tensor)
        return _swap(tensor) if self.swapped else tensor

    def _sizes(self, count: int) -> list[int]:
        shares = self.heads or [part.size for part in self.parts]
        return [count * share // sum(shares) for share in shares]

    def _rows(self, count: int) -> Tensor | None:
        """Megatron's row of each row of the parts one after the other; None if they stand so."""
        if self.heads:
            run = torch.arange(count).view(-1, sum(self.heads)).split(self.heads, 1)
            return torch.cat([part.flatten() for part in run])
        if self.pairs is None:
            return None
        plain, rotated = self.pairs
        run = torch.tensor([*range(plain), *range(plain, plain + rotated, 2), *range(plain + 1, plain + rotated, 2)])
        return (torch.arange(0, count, plain + rotated)[:, None] + run).flatten()


def _swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=1)
    return torch.cat((second, first), 1)


def entries(cfg: ModelConfig) -> list[Entry]:
    """Every parameter of a model, vocab_size set, and the biases of its routers."""
    norm, table = cfg.norm.kind == "layer_norm", cfg.vocab_size
    found = [_table("embedding.word_embeddings.weight", "embedding.weight", table)]
    if cfg.position.kind == "learned":
        found.append(_same("embedding.position_embeddings.weight", "position_embedding.weight", cfg.max_seq_len))
    for layer in range(cfg.layers):
        found += _block(cfg.of_block(layer), f"decoder.layers.{layer}", f"blocks.{layer}")
    found += _norm("decoder.final_layernorm", "final_norm", cfg.hidden, bias=norm)
    if not cfg.tie_embeddings:
        found.append(_table("output_layer.weight", "head.weight", table))
    for head in range(cfg.mtp.heads):
        found += _ahead(cfg, f"mtp.layers.{head}", f"mtp.{head}")
    return found


def _same(name: str, ours: str, size: int, dim: int | None = None) -> Entry:
    return Entry(name, (Part(ours, size, dim),))


def _table(name: str, ours: str, size: int) -> Entry:
    return _same(name, ours, size, 0)


def _norm(name: str, ours: str, size: int, *, bias: bool = False) -> list[Entry]:
    return [_same(f"{name}.{kind}", f"{ours}.{kind}", size) for kind in ("weight", *["bias"] * bias)]


def _block(cfg: ModelConfig, name: str, ours: str) -> Iterator[Entry]:
    bias = cfg.norm.kind == "layer_norm"
    norms = {"input_layernorm": "attention_norm", "pre_mlp_layernorm": "ffn_norm"}
    if cfg.norm.placement != "pre":
        norms |= {"post_attention_norm": "post_attention_norm", "post_ffn_norm": "post_ffn_norm"}
    attention = (_latent if cfg.attention.kind == "mla" else _grouped)(cfg, f"{name}.self_attention", f"{ours}.attention")
    ffn = (_experts if cfg.ffn.kind == "moe" else _dense)(cfg, f"{name}.mlp", f"{ours}.ffn")
    return chain(attention, ffn, *(_norm(f"{name}.{theirs}", f"{ours}.{mine}", cfg.hidden, bias=bias) for theirs, mine in norms.items()))


def _grouped(cfg: ModelConfig, name: str, ours: str) -> Iterator[Entry]:
    a, d = cfg.attention, cfg.head_dim
    sizes = {"q_proj": a.heads * d, "k_proj": cfg.kv_heads * d, "v_proj": cfg.kv_heads * d}
    heads = (a.heads // cfg.kv_heads * d, d, d)
    for kind in ("weight", *["bias"] * a.qkv_bias):
        yield Entry(f"{name}.linear_qkv.{kind}", tuple(Part(f"{ours}.{proj}.{kind}", size, 0) for proj, size in sizes.items()), heads)
    yield _same(f"{name}.linear_proj.weight", f"{ours}.out_proj.weight", cfg.hidden, 1)
    if a.out_bias:
        yield _same(f"{name}.linear_proj.bias", f"{ours}.out_proj.bias", cfg.hidden)
    for theirs, mine in {"q_layernorm": "q_norm", "k_layernorm": "k_norm"}.items() if a.qk_norm else ():
        yield from _norm(f"{name}.{theirs}", f"{ours}.{mine}", d)


def _latent(cfg: ModelConfig, name: str, ours: str) -> Iterator[Entry]:
    a, wide = cfg.attention, cfg.attention.heads * cfg.head_dim
    query = "linear_q_proj" if a.query_rank is None else "linear_q_up_proj"
    if a.query_rank is not None:
        yield _same(f"{name}.linear_q_down_proj.weight", f"{ours}.q_down_proj.weight", a.query_rank)
        yield from _norm(f"{name}.q_layernorm", f"{ours}.q_norm", a.query_rank)
    yield Entry(f"{name}.{query}.weight", (Part(f"{ours}.q_up_proj.weight", wide, 0),), pairs=(a.nope_dim, a.rope_dim))
    down = Part(f"{ours}.kv_down_proj.weight", a.kv_rank + a.rope_dim)
    yield Entry(f"{name}.linear_kv_down_proj.weight", (down,), pairs=(a.kv_rank, a.rope_dim))
    yield from _norm(f"{name}.kv_layernorm", f"{ours}.kv_norm", a.kv_rank)
    yield _same(f"{name}.linear_kv_up_proj.weight", f"{ours}.kv_up_proj.weight", a.heads * (a.nope_dim + a.value_dim), 0)
    yield _same(f"{name}.linear_proj.weight", f"{ours}.out_proj.weight", cfg.hidden, 1)


def _expanding(ffn) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if ffn.activation == "swiglu" else ("up_proj",)


def _network(name: str, ours: str, ffn, *, outside: int, inside: int) -> Iterator[Entry]:
    for kind in ("weight", *["bias"] * ffn.bias):
        yield Entry(f"{name}.linear_fc1.{kind}", tuple(Part(f"{ours}.{proj}.{kind}", inside, 0) for proj in _expanding(ffn)))
        yield _same(f"{name}.linear_fc2.{kind}", f"{ours}.down_proj.{kind}", outside, 1 if kind == "weight" else None)


def _dense(cfg: ModelConfig, name: str, ours: str) -> Iterator[Entry]:
    return _network(name, ours, cfg.ffn, outside=cfg.hidden, inside=cfg.ffn.hidden)


def _experts(cfg: ModelConfig, name: str, ours: str) -> Iterator[Entry]:
    ffn, width = cfg.ffn, cfg.ffn.descend or cfg.hidden
    yield _same(f"{name}.router.weight", f"{ours}.router.weight", ffn.experts)
    if ffn.router.bias_rate is not None:
        yield _same(f"{name}.router.expert_bias", f"{ours}.router.bias", ffn.experts)
    if ffn.descend:
        yield _same(f"{name}.fc1_latent_proj.weight", f"{ours}.descend_proj.weight", ffn.descend)
        yield _same(f"{name}.fc2_latent_proj.weight", f"{ours}.ascend_proj.weight", cfg.hidden)
    if ffn.shared_experts:
        yield from _network(f"{name}.shared_experts", f"{ours}.shared", ffn, outside=cfg.hidden, inside=ffn.shared_hidden)
    for expert in range(ffn.experts):
        yield from _expert(ffn, width, f"{name}.experts.local_experts.{expert}", f"{ours}.experts", expert)


def _expert(ffn, width: int, name: str, ours: str, expert: int) -> Iterator[Entry]:
    """Stacks are [E,D,F] and [E,F,D] here, and biases [E,F] and [E,D]."""
    into = tuple(Part(f"{ours}.{proj}", ffn.hidden, 1, expert) for proj in _expanding(ffn))
    yield Entry(f"{name}.linear_fc1.weight", into, transposed=True)
    yield Entry(f"{name}.linear_fc2.weight", (Part(f"{ours}.down_proj", width, 0, expert),), transposed=True)
    if ffn.bias:
        biases = tuple(Part(f"{ours}.{proj.removesuffix('_proj')}_bias", ffn.hidden, 0, expert) for proj in _expanding(ffn))
        yield Entry(f"{name}.linear_fc1.bias", biases)
        yield Entry(f"{name}.linear_fc2.bias", (Part(f"{ours}.down_bias", width, None, expert),))


def _ahead(cfg: ModelConfig, name: str, ours: str) -> Iterator[Entry]:
    bias = cfg.norm.kind == "layer_norm"
    yield from _norm(f"{name}.enorm", f"{ours}.embedding_norm", cfg.hidden, bias=bias)
    yield from _norm(f"{name}.hnorm", f"{ours}.hidden_norm", cfg.hidden, bias=bias)
    yield Entry(f"{name}.eh_proj.weight", (Part(f"{ours}.proj.weight", cfg.hidden),), swapped=True)  # [e; h] there, [h; e] here
    yield from _block(cfg, f"{name}.transformer_layer", f"{ours}.block")


def to_canonical(cfg: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole canonical parameters out of whole tensors of Megatron's, padding of the vocabulary cut off."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for entry in entries(cfg):
        for part, tensor in zip(entry.parts, entry.split(_unpadded(entry, tensors[entry.name], cfg))):
            if part.expert is None:
                found[part.name] = tensor
            else:
                stacks.setdefault(part.name, {})[part.expert] = tensor
    return found | {name: torch.stack([experts[index] for index in sorted(experts)]) for name, experts in stacks.items()}


def to_megatron(cfg: ModelConfig, tensors: Mapping[str, Tensor], *, multiple: int = 1) -> dict[str, Tensor]:
    """The inverse: Megatron's tensors, the vocabulary padded with zeros to a multiple of `multiple` rows."""
    found = {}
    for entry in entries(cfg):
        parts = [tensors[part.name] if part.expert is None else tensors[part.name][part.expert] for part in entry.parts]
        found[entry.name] = entry.join(parts)
        if entry.name in PADDED:
            rows = -(-cfg.vocab_size // multiple) * multiple - cfg.vocab_size
            found[entry.name] = torch.nn.functional.pad(found[entry.name], (0, 0, 0, rows))
    return found


PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def _unpadded(entry: Entry, tensor: Tensor, cfg: ModelConfig) -> Tensor:
    return tensor[: cfg.vocab_size] if entry.name in PADDED else tensor
