"""What the kernels share: loading rows, and which tiles a block visits. Within what triton-ascend 3.2 and current triton share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(-1.0e30)
"""Below every score; finite, so that no infinity is subtracted from another."""


@triton.jit
def load_rows(base, start, stride, limit, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHECKED: tl.constexpr):
    """Rows start.. of a matrix `limit` rows high and WIDTH wide -> [ROWS,PADDED], zeros beyond the edges.

    CHECKED: rows may lie beyond `limit`. The start is added in 64 bits, the rest fits 32.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    places = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECKED:
        inside = (start + rows)[:, None] < limit
        if WIDTH != PADDED:
            inside = inside & (columns[None, :] < WIDTH)
        return tl.load(places, mask=inside, other=0.0)
    elif WIDTH != PADDED:
        inside = (rows[:, None] >= 0) & (columns[None, :] < WIDTH)
        return tl.load(places, mask=inside, other=0.0)
    else:
        return tl.load(places)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b, summed in fp32. PRECISION: what tl.dot takes, or "widened", since Triton's interpreter multiplies bf16 as whole numbers."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def store_rows(base, start, stride, limit, values, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS,PADDED] in fp32 -> rows start.. of a matrix, cast to its dtype; what lies beyond the edges is dropped."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    places = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = ((start + rows)[:, None] < limit) & (columns[None, :] < WIDTH)
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_line(base, start, limit, ROWS: tl.constexpr):
    """Elements start.. of a vector of `limit` -> [ROWS], zeros beyond its end."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(base + rows, mask=rows < limit, other=0)


@triton.jit
def tiles(first, last, start, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tiles of COLUMNS that the rows start.. visit, by the ends of their intervals: (begin, plain, mixed, end).

    begin <= plain <= mixed <= end: wholly visible are those from `plain` up to, not including, `mixed`, and partly hidden the others.
    """
    stop = tl.minimum(start + ROWS, limit) - 1
    low, high = tl.load(first + start), tl.load(last + stop)
    begin = low // COLUMNS
    end = tl.where(high > low, (high + COLUMNS - 1) // COLUMNS, begin)
    plain = tl.minimum((tl.load(first + stop) + COLUMNS - 1) // COLUMNS, end)
    mixed = tl.minimum(tl.maximum(tl.load(last + start) // COLUMNS, plain), end)
    return begin, plain, mixed, end
