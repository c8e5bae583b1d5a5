"""Calls of attention, drawn over the support matrix of a kernel."""

from dataclasses import dataclass

from attention_call import AttentionCall
from hypothesis import strategies as st
from llmtrain_kernels.mask import Mask

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128))
"""Head dims of q.k and v; the last is multi-head latent attention."""


@dataclass(frozen=True)
class Matrix:
    """What a kernel supports, and how large the calls are. `tile`: lengths are drawn at, beside and between its multiples."""

    tile: int = 16
    longest: int = 70
    head_dims: tuple[tuple[int, int], ...] = HEAD_DIMS
    most_rows: int = 2
    most_kv_heads: int = 2
    most_group: int = 3
    full: bool = True
    windows: bool = True
    documents: bool = True
    offsets: bool = True
    lse: bool = True


def _length(matrix: Matrix) -> st.SearchStrategy[int]:
    multiples = range(matrix.tile, matrix.longest, matrix.tile)
    near = sorted({n + by for n in multiples for by in (-1, 0, 1) if 1 <= n + by <= matrix.longest})
    return st.sampled_from(near) | st.integers(1, matrix.longest) if near else st.integers(1, matrix.longest)


@st.composite
def _lengths(draw, total: int, tile: int) -> tuple[int, ...]:
    """Document lengths that sum to `total`, often with borders at tiles."""
    if total == 1:
        return (1,)
    border = st.integers(1, total - 1)
    if total > tile:
        border |= st.sampled_from(range(tile, total, tile))
    cuts = sorted(draw(st.sets(border, max_size=5)))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total]))


@st.composite
def _places(draw, matrix: Matrix) -> tuple[int, int, int, int]:
    """Queries, keys, q_offset, kv_offset: plain, after a cache, or pieces anywhere (context parallelism)."""
    queries = draw(_length(matrix))
    kind = draw(st.sampled_from(("plain", "cache", "anywhere"))) if matrix.offsets else "plain"
    if kind == "plain":
        return queries, queries, 0, 0
    keys = draw(_length(matrix))
    if kind == "cache":
        queries, keys = sorted((queries, keys))
        return queries, keys, keys - queries, 0
    return queries, keys, draw(st.integers(0, 2 * matrix.tile)), draw(st.integers(0, 2 * matrix.tile))


@st.composite
def calls(draw, matrix: Matrix) -> AttentionCall:
    """Calls of the matrix."""
    rows, kv_heads = draw(st.integers(1, matrix.most_rows)), draw(st.integers(1, matrix.most_kv_heads))
    queries, keys, q_offset, kv_offset = draw(_places(matrix))
    end = max(q_offset + queries, kv_offset + keys)
    causal = draw(st.sampled_from((True, True, False))) if matrix.full else True
    documents = None
    if matrix.documents and draw(st.booleans()):
        documents = tuple(draw(_lengths(end, matrix.tile)) for _ in range(rows))
    window = draw(st.none() | st.integers(1, end + 1)) if causal and matrix.windows else None
    d, dv = draw(st.sampled_from(matrix.head_dims))
    return AttentionCall(
        Mask(causal=causal, documents=documents, window=window),
        rows=rows,
        heads=kv_heads * draw(st.integers(1, matrix.most_group)),
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        d=d,
        dv=dv,
        q_offset=q_offset,
        kv_offset=kv_offset,
        scale=draw(st.sampled_from((None, 0.1))),
        lse=matrix.lse and draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
