"""Inputs for every op: small shapes that reach its branches, drawn in float64 on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops import KeyLengths, Mask

Tensors = dict[str, Tensor]


@dataclass
class Case:
    """One call of an op. `call(function, tensors) -> outputs by name` makes it; `facts` are those of `Call`.

    grad: the tensors whose gradients are compared. wide: tensors that stay in fp32 where the call computes in 16 bits.
    """

    name: str
    tensors: Tensors
    call: Callable[[Callable, Tensors], dict[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)
    grad: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()


def cases(op: str) -> list[Case]:
    """The cases of `op`, always with the same numbers; none for an op that is not known here."""
    make = MAKERS.get(op)
    return [] if make is None else make(torch.Generator().manual_seed(20))


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _pointwise(*names: str) -> Callable[[torch.Generator], list[Case]]:
    def make(g: torch.Generator) -> list[Case]:
        shapes = {"[2, 48, 128]": (2, 48, 128), "[3, 5, 64]": (3, 5, 64)}
        return [
            Case(label, {n: _normal(g, *shape) for n in names}, lambda f, t: {"out": f(*t.values())}, grad=names)
            for label, shape in shapes.items()
        ]

    return make


def _norm(*names: str) -> Callable[[torch.Generator], list[Case]]:
    def make(g: torch.Generator) -> list[Case]:
        found = []
        for rows, width in ((96, 128), (7, 512)):
            tensors = {n: _normal(g, rows, width) * 3 if n == "x" else _normal(g, width) for n in names}
            found.append(Case(f"[{rows}, {width}]", tensors, lambda f, t: {"out": f(*t.values(), 1e-6)}, grad=names))
        return found

    return make


def _add_norm(g: torch.Generator) -> list[Case]:
    found = []
    for rows, width in ((96, 128), (7, 512)):
        tensors = {"x": _normal(g, rows, width), "residual": _normal(g, rows, width) * 3, "weight": _normal(g, width)}

        def call(f: Callable, t: Tensors) -> dict[str, Tensor]:
            return dict(zip(("norm", "sum"), f(*t.values(), 1e-6)))

        found.append(Case(f"[{rows}, {width}]", tensors, call, grad=tuple(tensors)))
    return found


def _rope(g: torch.Generator) -> list[Case]:
    found = []
    for rows, heads, length, dim in ((2, 4, 32, 64), (1, 3, 17, 128)):
        angles = torch.outer(torch.arange(length, dtype=torch.float64), 10000 ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64))
        angles = torch.cat([angles, angles], -1)[None, None]
        tensors = {"x": _normal(g, rows, heads, length, dim), "cos": angles.cos(), "sin": angles.sin()}
        facts = {"head_dim": dim, "heads": heads, "kv_heads": heads}
        name = f"[{rows}, {heads}, {length}, {dim}]"
        found.append(Case(name, tensors, lambda f, t: {"out": f(t["x"], t["cos"], t["sin"])}, facts, ("x",), ("cos", "sin")))
    return found


def _attention(g: torch.Generator) -> list[Case]:
    shapes = {
        "causal, GQA": (2, 4, 2, 64, 64, 64, Mask(), False),
        "documents": (2, 4, 4, 64, 64, 64, Mask(documents=((20, 44), (7, 1, 56))), False),
        "window 16": (1, 4, 2, 64, 64, 64, Mask(window=16), False),
        "full": (1, 2, 2, 48, 64, 64, Mask(causal=False), False),
        "causal, head dim 128": (1, 2, 1, 40, 128, 128, Mask(), False),
        "narrower values": (1, 2, 2, 32, 96, 64, Mask(), False),
        "with log-sum-exp": (2, 4, 2, 64, 64, 64, Mask(), True),
        "1 row of 300": (1, 2, 2, 300, 64, 64, Mask(), False),
    }
    return [_attention_case(g, name, *shape) for name, shape in shapes.items()]


def _attention_case(g, name: str, rows: int, heads: int, kv: int, length: int, dim: int, width: int, mask: Mask, lse: bool) -> Case:
    def call(f: Callable, t: Tensors) -> dict[str, Tensor]:
        given = f(t["q"], t["k"], t["v"], mask=mask, return_lse=lse)
        return dict(zip(("out", "lse"), given)) if lse else {"out": given}

    tensors = {"q": _normal(g, rows, heads, length, dim), "k": _normal(g, rows, kv, length, dim), "v": _normal(g, rows, kv, length, width)}
    facts = {"head_dim": dim, "value_head_dim": width, "heads": heads, "kv_heads": kv, "causal": mask.causal, "return_lse": lse}
    facts |= {"documents": mask.documents is not None, "window": mask.window}
    return Case(name, tensors, call, facts, ("q", "k", "v"))


def _part(g: torch.Generator) -> list[Case]:
    found = []
    for causal, keys in ((True, 48), (False, 32)):
        tensors = {"q": _normal(g, 2, 4, 48, 64), "k": _normal(g, 2, 2, keys, 64), "v": _normal(g, 2, 2, keys, 64)}

        def call(f: Callable, t: Tensors, causal: bool = causal) -> dict[str, Tensor]:
            return dict(zip(("out", "lse"), f(t["q"], t["k"], t["v"], causal=causal, scale=0.125)))

        found.append(Case("causal" if causal else "every key", tensors, call, _PART_FACTS | {"causal": causal}))
    return found


_PART_FACTS = {"head_dim": 64, "value_head_dim": 64, "heads": 4, "kv_heads": 2, "return_lse": True, "backward": False}


def _part_backward(g: torch.Generator) -> list[Case]:
    from llmtrain.ops.attention_parts import attention_part_reference

    found = []
    for case in _part(g):
        causal = case.facts["causal"]
        t = case.tensors
        out, lse = attention_part_reference(t["q"], t["k"], t["v"], causal=causal, scale=0.125)
        tensors = {"grad": _normal(g, *out.shape), **t, "out": out, "lse": lse}

        def call(f: Callable, t: Tensors, causal: bool = causal) -> dict[str, Tensor]:
            return dict(zip(("dq", "dk", "dv"), f(*t.values(), causal=causal, scale=0.125)))

        found.append(Case(case.name, tensors, call, case.facts, wide=("lse",)))
    return found


def _decode(g: torch.Generator) -> list[Case]:
    found = []
    scenarios = (
        ("lengths 9, 40, 33", (9, 40, 33), None, 64),
        ("window 8", (40, 12, 40), 8, 64),
        ("values of 48", (9, 40, 33), None, 48),
    )
    for name, lengths, window, width in scenarios:
        tensors = {"q": _normal(g, 3, 4, 1, 64), "k": _normal(g, 3, 2, 40, 64), "v": _normal(g, 3, 2, 40, width)}

        def call(f: Callable, t: Tensors, lengths=lengths, window=window) -> dict[str, Tensor]:
            return {"out": f(t["q"], t["k"], t["v"], lengths=KeyLengths(lengths), window=window)}

        facts = {"head_dim": 64, "value_head_dim": width, "heads": 4, "kv_heads": 2, "window": window, "backward": False}
        found.append(Case(name, tensors, call, facts))
    return found


def _cross_entropy(g: torch.Generator) -> list[Case]:
    found = []
    for rows, width, vocab, chunk in ((40, 64, 301, 16), (33, 128, 1000, 64)):
        targets = torch.randint(0, vocab, (rows,), generator=g)
        targets[::5] = -100
        tensors = {"hidden": _normal(g, rows, width), "weight": _normal(g, vocab, width) / width**0.5, "targets": targets}

        def call(f: Callable, t: Tensors, chunk: int = chunk) -> dict[str, Tensor]:
            return {"loss": f(t["hidden"], t["weight"], t["targets"], chunk=chunk)}

        found.append(Case(f"{rows} rows, vocabulary {vocab}", tensors, call, grad=("hidden", "weight")))
    return found


def _grouped(g: torch.Generator) -> list[Case]:
    found = []
    for name, counts in (("uneven", (5, 0, 40, 19)), ("one expert", (0, 0, 64, 0))):
        tensors = {"x": _normal(g, 64, 32), "weight": _normal(g, 4, 32, 48) / 32**0.5, "counts": torch.tensor(counts)}
        call = lambda f, t: {"out": f(t["x"], t["weight"], t["counts"])}  # noqa: E731
        found.append(Case(name, tensors, call, {"expert_widths": (32, 48)}, ("x", "weight")))
    return found


def _ids(g: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(6, generator=g)[:2] for _ in range(50)])


def _permute(g: torch.Generator) -> list[Case]:
    def call(f: Callable, t: Tensors) -> dict[str, Tensor]:
        return dict(zip(("rows", "order", "counts"), f(t["x"], t["ids"], 6)))

    return [Case("50 tokens to 2 of 6", {"x": _normal(g, 50, 32), "ids": _ids(g)}, call, grad=("x",))]


def _unpermute(g: torch.Generator) -> list[Case]:
    tensors = {
        "rows": _normal(g, 100, 32),
        "order": _ids(g).flatten().argsort(stable=True),
        "probs": torch.rand(50, 2, generator=g).double(),
    }
    return [Case("50 tokens from 2", tensors, lambda f, t: {"out": f(t["rows"], t["order"], t["probs"])}, grad=("rows", "probs"))]


def _adamw(g: torch.Generator) -> list[Case]:
    def call(f: Callable, t: Tensors) -> dict[str, Tensor]:
        parameters = [torch.nn.Parameter(t[n].detach().clone()) for n in ("matrix", "vector")]
        groups = [{"params": [parameters[0]], "weight_decay": 0.1}, {"params": [parameters[1]], "weight_decay": 0.0}]
        optimizer = f(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
        for step in range(3):
            for parameter, name in zip(parameters, ("grad_matrix", "grad_vector")):
                parameter.grad = t[name] * (step - 1.3)
            optimizer.step()
        return dict(zip(("matrix", "vector"), (p.detach() for p in parameters)))

    tensors = {name: _normal(g, *((40, 32) if "matrix" in name else (130,))) for name in ("matrix", "vector", "grad_matrix", "grad_vector")}
    return [Case("3 steps", tensors, call)]


MAKERS: dict[str, Callable[[torch.Generator], list[Case]]] = {
    "swiglu": _pointwise("gate", "up"),
    "gelu": _pointwise("x"),
    "rms_norm": _norm("x", "weight"),
    "add_rms_norm": _add_norm,
    "layer_norm": _norm("x", "weight", "bias"),
    "rope": _rope,
    "attention": _attention,
    "attention_part": _part,
    "attention_part_backward": _part_backward,
    "decode_attention": _decode,
    "cross_entropy": _cross_entropy,
    "grouped_mm": _grouped,
    "permute": _permute,
    "unpermute": _unpermute,
    "adamw": _adamw,
}
