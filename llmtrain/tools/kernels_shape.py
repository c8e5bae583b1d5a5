"""The shapes that `llmtrain kernels --bench` measures: those of a configuration, changed by options, or options alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.tools.selftest.kernel_cases import Case


@dataclass(frozen=True)
class Shape:
    """What one forward pass of a micro-batch asks of the ops, on one rank. `documents` per row; 0 stands for what follows from others."""

    batch: int = 1
    seq_len: int = 1024
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    value_head_dim: int = 0
    window: int = 0
    documents: int = 1
    hidden: int = 0
    ffn: int = 0
    vocab: int = 32_000

    def complete(self) -> "Shape":
        """With all that follows filled in. Raises UserError for numbers that make no shape."""
        shape = replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            value_head_dim=self.value_head_dim or self.head_dim,
            hidden=self.hidden or self.heads * self.head_dim,
            ffn=self.ffn or 4 * (self.hidden or self.heads * self.head_dim),
        )
        for field in fields(shape):
            least = 0 if field.name == "window" else 1
            if getattr(shape, field.name) < least:
                raise UserError(f"{option(field.name)} {getattr(shape, field.name)}: it is at least {least}")
        if shape.heads % shape.kv_heads:
            raise UserError(f"--kv-heads {shape.kv_heads}: --heads {shape.heads} is no multiple of it")
        if shape.head_dim % 2:
            raise UserError(f"--head-dim {shape.head_dim}: it is even")
        if shape.documents > shape.seq_len:
            raise UserError(f"--documents {shape.documents}: a row of --seq-len {shape.seq_len} has no room for them")
        return shape

    def small(self, tokens: int) -> "Shape":
        """A part of it that the float64 reference can compute: one row, the heads of one key head, at most `tokens`."""
        length = min(self.seq_len, tokens)
        heads = self.heads // self.kv_heads
        return replace(self, batch=1, heads=heads, kv_heads=1, seq_len=length, documents=min(self.documents, length))

    def mask(self) -> Mask:
        """Causal; documents of a row grow in length, so that short and long ones are there."""
        if self.documents == 1:
            return Mask(window=self.window or None)
        parts = self.documents * (self.documents + 1) // 2
        ends = [self.seq_len * (n * (n + 1) // 2) // parts for n in range(1, self.documents + 1)]
        ends = [max(end, n) for n, end in enumerate(ends, 1)]
        lengths = tuple(b - a for a, b in zip([0, *ends], ends))
        return Mask(documents=(lengths,) * self.batch, window=self.window or None)

    def pairs(self) -> int:
        """Queries and keys that see each other in all rows, for one head."""
        mask = self.mask()
        lengths = (self.seq_len,) if mask.documents is None else mask.documents[0]
        return self.batch * sum(_triangle(length, min(length, self.window or length)) for length in lengths)


def _triangle(length: int, window: int) -> int:
    return window * (window + 1) // 2 + (length - window) * window


def option(field: str) -> str:
    """The command line's name of a field."""
    return f"--{field.replace('_', '-')}"


def shape_of(cfg: RunConfig) -> Shape:
    """What a run asks of one rank; four documents per row where it keeps documents apart."""
    model, tp = cfg.model, cfg.parallel.tp
    return Shape(
        batch=cfg.train.micro_batch,
        seq_len=cfg.train.seq_len,
        heads=model.attention.heads // tp,
        kv_heads=max(1, model.kv_heads // tp),
        head_dim=model.head_dim,
        value_head_dim=model.value_head_dim,
        window=model.attention.window or 0,
        documents=min(4, cfg.train.seq_len) if cfg.data.document_mask else 1,
        hidden=model.hidden,
        ffn=model.ffn.hidden // tp,
        vocab=(model.vocab_size or Shape.vocab) // tp,
    )


def case(op: str, shape: Shape) -> Case:
    """The op's call at this shape. Raises UserError for ops without one."""
    if op not in MAKERS:
        raise UserError(f"--op {op}: has no benchmark; allowed: {', '.join(['all', *MAKERS])}")
    tensors, call, facts = MAKERS[op](shape, torch.Generator().manual_seed(20))
    named = {"head_dim": shape.head_dim, "value_head_dim": shape.value_head_dim, "heads": shape.heads, "kv_heads": shape.kv_heads}
    grad = tuple(name for name, tensor in tensors.items() if tensor.is_floating_point() and name not in ("cos", "sin"))
    return Case(op, tensors, call, named | dict(facts), grad, ("cos", "sin"))


Made = tuple[dict[str, Tensor], Callable[[Callable, dict[str, Tensor]], dict[str, Tensor]], Mapping[str, Any]]


def _normal(g: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=g)


def _attention(s: Shape, g: torch.Generator) -> Made:
    """As a model has them: views of [B,S,H,d]."""
    widths = {"q": (s.heads, s.head_dim), "k": (s.kv_heads, s.head_dim), "v": (s.kv_heads, s.value_head_dim)}
    tensors = {name: _normal(g, s.batch, s.seq_len, *width).transpose(1, 2) for name, width in widths.items()}
    mask = s.mask()
    facts = {"documents": mask.documents is not None, "window": mask.window}
    return tensors, lambda f, t: {"out": f(t["q"], t["k"], t["v"], mask=mask)}, facts


def _norm(*names: str) -> Callable[[Shape, torch.Generator], Made]:
    def make(s: Shape, g: torch.Generator) -> Made:
        tensors = {n: _normal(g, s.hidden) if n in ("weight", "bias") else _normal(g, s.batch, s.seq_len, s.hidden) for n in names}
        return tensors, lambda f, t: _named(f(*t.values(), 1e-6)), {}

    return make


def _named(given: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"out": given} if isinstance(given, Tensor) else dict(zip(("out", "sum"), given))


def _pointwise(*names: str) -> Callable[[Shape, torch.Generator], Made]:
    def make(s: Shape, g: torch.Generator) -> Made:
        return {n: _normal(g, s.batch, s.seq_len, s.ffn) for n in names}, lambda f, t: {"out": f(*t.values())}, {}

    return make


def _rope(s: Shape, g: torch.Generator) -> Made:
    powers = 10_000 ** -torch.linspace(0, 1, s.head_dim // 2)
    angles = torch.outer(torch.arange(s.seq_len).float(), powers).repeat(1, 2)[None, None]
    tensors = {"x": _normal(g, s.batch, s.seq_len, s.heads, s.head_dim).transpose(1, 2), "cos": angles.cos(), "sin": angles.sin()}
    return tensors, lambda f, t: {"out": f(t["x"], t["cos"], t["sin"])}, {}


def _cross_entropy(s: Shape, g: torch.Generator) -> Made:
    rows = s.batch * s.seq_len
    tensors = {"hidden": _normal(g, rows, s.hidden), "weight": _normal(g, s.vocab, s.hidden) / s.hidden**0.5}
    tensors["targets"] = torch.randint(0, s.vocab, (rows,), generator=g)
    return tensors, lambda f, t: {"loss": f(t["hidden"], t["weight"], t["targets"], chunk=1024)}, {}


MAKERS: dict[str, Callable[[Shape, torch.Generator], Made]] = {
    "attention": _attention,
    "rms_norm": _norm("x", "weight"),
    "add_rms_norm": _norm("x", "residual", "weight"),
    "layer_norm": _norm("x", "weight", "bias"),
    "rope": _rope,
    "swiglu": _pointwise("gate", "up"),
    "gelu": _pointwise("x"),
    "cross_entropy": _cross_entropy,
}
"""Ops with a benchmark, and how their call is made."""
