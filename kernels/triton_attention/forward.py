"""The forward kernel: a block of queries walks the tiles of keys that it sees, with the online softmax (arXiv 2307.08691)."""

import triton
import triton.language as tl
from llmtrain_kernels.triton_attention.blocks import FAR, LN2, load_line, load_rows, product, store_rows, tiles


@triton.jit
def _tile(
    query, first, last, top, total, sums, k, v, tile, k_row, v_row, scale, keys,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to maximum, sum and weighted values of the rows."""
    start = tile * COLUMNS
    key = load_rows(k, start, k_row, keys, D, D_PAD, COLUMNS, MASKED)
    scores = product(query, tl.trans(key), PRECISION)
    if MASKED:
        place = (start + tl.arange(0, COLUMNS))[None, :]
        seen = (place >= first[:, None]) & (place < last[:, None])
        scores = tl.where(seen, scores, FAR)
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)  # a row that has seen no key yet has FAR as its maximum
    shrink = tl.exp2(top - higher)
    value = load_rows(v, start, v_row, keys, DV, DV_PAD, COLUMNS, MASKED)
    sums = sums * shrink[:, None] + product(weights.to(value.dtype), value, PRECISION)
    return higher, total * shrink + tl.sum(weights, 1), sums


@triton.jit
def attention_forward(
    q, k, v, out, lse, first, last, scale, mask_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, queries, keys, task,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of ROWS queries of one head. `scale` counts in log 2, `lse` [B,H,S] in natural logarithms; `task`: first of this launch."""
    blocks = (queries + ROWS - 1) // ROWS
    task = task + tl.program_id(0)
    line = task // blocks
    start = (blocks - 1 - task % blocks) * ROWS  # under a causal mask the last blocks have most to do, so they begin
    batch, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    first += batch * mask_row
    last += batch * mask_row
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head

    query = load_rows(q + batch * q_batch + head * q_head, start, q_row, queries, D, D_PAD, ROWS, True)
    low, high = load_line(first, start, queries, ROWS), load_line(last, start, queries, ROWS)
    begin, plain, mixed, end = tiles(first, last, start, queries, ROWS, COLUMNS)
    top = tl.full([ROWS], FAR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DV_PAD], tl.float32)
    for index in range(plain - begin + end - mixed):
        tile = tl.where(index < plain - begin, begin + index, mixed + index - (plain - begin))
        top, total, sums = _tile(
            query, low, high, top, total, sums, k, v, tile, k_row, v_row, scale, keys, D, DV, D_PAD, DV_PAD, ROWS, COLUMNS, PRECISION, True
        )  # fmt: skip
    for index in range(mixed - plain):
        tile = plain + index
        top, total, sums = _tile(
            query, low, high, top, total, sums, k, v, tile, k_row, v_row, scale, keys, D, DV, D_PAD, DV_PAD, ROWS, COLUMNS, PRECISION, False
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_rows(out + batch * out_batch + head * out_head, start, out_row, queries, sums / total[:, None], DV, DV_PAD, ROWS)
    row = start + tl.arange(0, ROWS)
    natural = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(lse + line.to(tl.int64) * queries + row, natural, mask=row < queries)
