"""The backward kernels: weights are computed again from lse; each gradient is summed by one block, in one order, without atomics."""

import triton
import triton.language as tl
from llmtrain_kernels.triton_attention.blocks import LOG2E, load_line, load_rows, product, store_rows, tiles


@triton.jit
def attention_delta(
    out, grad, lse, grad_lse, delta, out_batch, out_head, out_row, grad_batch, grad_head, grad_row, heads, queries, task,
    HAS_GRAD_LSE: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [B,H,S]: what the scores of a query lose in the softmax, sum(grad * out) less the gradient of lse; 0 where no key is seen."""
    blocks = (queries + ROWS - 1) // ROWS
    task = task + tl.program_id(0)
    line, start = (task // blocks).to(tl.int64), task % blocks * ROWS
    batch, head = line // heads, line % heads
    value = load_rows(out + batch * out_batch + head * out_head, start, out_row, queries, DV, DV_PAD, ROWS, True).to(tl.float32)
    slope = load_rows(grad + batch * grad_batch + head * grad_head, start, grad_row, queries, DV, DV_PAD, ROWS, True).to(tl.float32)
    lost = tl.sum(value * slope, 1)
    if HAS_GRAD_LSE:
        lost -= load_line(grad_lse + line * queries, start, queries, ROWS)
    lost = tl.where(load_line(lse + line * queries, start, queries, ROWS) == float("-inf"), 0.0, lost)
    row = start + tl.arange(0, ROWS)
    tl.store(delta + line * queries + row, lost, mask=row < queries)


@triton.jit
def _query_tile(
    query, slope, low, high, shift, lost, sums, k, v, tile, k_row, v_row, scale, keys,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to the gradient of the queries, which is still to be scaled."""
    start = tile * COLUMNS
    key = load_rows(k, start, k_row, keys, D, D_PAD, COLUMNS, MASKED)
    value = load_rows(v, start, v_row, keys, DV, DV_PAD, COLUMNS, MASKED)
    weights = tl.exp2(product(query, tl.trans(key), PRECISION) * scale - shift[:, None])
    if MASKED:
        place = (start + tl.arange(0, COLUMNS))[None, :]
        weights = tl.where((place >= low[:, None]) & (place < high[:, None]), weights, 0.0)
    change = weights * (product(slope, tl.trans(value), PRECISION) - lost[:, None])
    return sums + product(change.to(key.dtype), key, PRECISION)


@triton.jit
def attention_backward_q(
    q, k, v, grad, lse, delta, grad_q, first, last, scale, mask_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row, out_batch, out_head, out_row,
    heads, queries, keys, task,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of ROWS queries of one head; `out_*` are the strides of grad_q. `scale` is the natural one."""
    blocks = (queries + ROWS - 1) // ROWS
    task = task + tl.program_id(0)
    line = task // blocks
    start = (blocks - 1 - task % blocks) * ROWS
    batch, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    first += batch * mask_row
    last += batch * mask_row
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head

    query = load_rows(q + batch * q_batch + head * q_head, start, q_row, queries, D, D_PAD, ROWS, True)
    slope = load_rows(grad + batch * grad_batch + head * grad_head, start, grad_row, queries, DV, DV_PAD, ROWS, True)
    shift = load_line(lse + line.to(tl.int64) * queries, start, queries, ROWS) * LOG2E
    lost = load_line(delta + line.to(tl.int64) * queries, start, queries, ROWS)
    low, high = load_line(first, start, queries, ROWS), load_line(last, start, queries, ROWS)
    begin, plain, mixed, end = tiles(first, last, start, queries, ROWS, COLUMNS)
    sums = tl.zeros([ROWS, D_PAD], tl.float32)
    for index in range(plain - begin + end - mixed):
        tile = tl.where(index < plain - begin, begin + index, mixed + index - (plain - begin))
        sums = _query_tile(
            query, slope, low, high, shift, lost, sums, k, v, tile, k_row, v_row, scale * LOG2E, keys,
            D, DV, D_PAD, DV_PAD, ROWS, COLUMNS, PRECISION, True,
        )  # fmt: skip
    for index in range(mixed - plain):
        tile = plain + index
        sums = _query_tile(
            query, slope, low, high, shift, lost, sums, k, v, tile, k_row, v_row, scale * LOG2E, keys,
            D, DV, D_PAD, DV_PAD, ROWS, COLUMNS, PRECISION, False,
        )  # fmt: skip
    store_rows(grad_q + batch * out_batch + head * out_head, start, out_row, queries, sums * scale, D, D_PAD, ROWS)


@triton.jit
def _key_tile(
    key, value, low, high, sums_k, sums_v, q, grad, lse, delta, tile, q_row, grad_row, scale, queries,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to the gradients of the keys, still to be scaled, and of the values. Scores lie here as [keys,queries]."""
    start = tile * ROWS
    query = load_rows(q, start, q_row, queries, D, D_PAD, ROWS, MASKED)
    slope = load_rows(grad, start, grad_row, queries, DV, DV_PAD, ROWS, MASKED)
    shift = load_line(lse, start, queries, ROWS) * LOG2E
    lost = load_line(delta, start, queries, ROWS)
    weights = tl.exp2(product(key, tl.trans(query), PRECISION) * scale - shift[None, :])
    if MASKED:
        place = (start + tl.arange(0, ROWS))[None, :]
        weights = tl.where((place >= low[:, None]) & (place < high[:, None]), weights, 0.0)
    sums_v += product(weights.to(slope.dtype), slope, PRECISION)
    change = weights * (product(value, tl.trans(slope), PRECISION) - lost[None, :])
    sums_k += product(change.to(query.dtype), query, PRECISION)
    return sums_k, sums_v


@triton.jit
def attention_backward_kv(
    q, k, v, grad, lse, delta, grad_k, grad_v, q_first, q_last, scale, mask_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    gk_batch, gk_head, gk_row, gv_batch, gv_head, gv_row,
    kv_heads, queries, keys, task,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of COLUMNS keys and values of one key head, summed over its GROUP query heads in order."""
    blocks = (keys + COLUMNS - 1) // COLUMNS
    task = task + tl.program_id(0)
    line, start = task // blocks, task % blocks * COLUMNS
    batch, head = (line // kv_heads).to(tl.int64), (line % kv_heads).to(tl.int64)
    q_first += batch * mask_row
    q_last += batch * mask_row
    q += batch * q_batch + head * GROUP * q_head
    grad += batch * grad_batch + head * GROUP * grad_head
    lse += line.to(tl.int64) * GROUP * queries
    delta += line.to(tl.int64) * GROUP * queries

    key = load_rows(k + batch * k_batch + head * k_head, start, k_row, keys, D, D_PAD, COLUMNS, True)
    value = load_rows(v + batch * v_batch + head * v_head, start, v_row, keys, DV, DV_PAD, COLUMNS, True)
    low, high = load_line(q_first, start, keys, COLUMNS), load_line(q_last, start, keys, COLUMNS)
    begin, plain, mixed, end = tiles(q_first, q_last, start, keys, COLUMNS, ROWS)
    sums_k = tl.zeros([COLUMNS, D_PAD], tl.float32)
    sums_v = tl.zeros([COLUMNS, DV_PAD], tl.float32)
    partly = plain - begin + end - mixed
    for index in range(GROUP * partly):  # one loop rather than two, so that it is pipelined
        member, tile = (index // partly).to(tl.int64), index % partly
        tile = tl.where(tile < plain - begin, begin + tile, mixed + tile - (plain - begin))
        sums_k, sums_v = _key_tile(
            key, value, low, high, sums_k, sums_v,
            q + member * q_head, grad + member * grad_head, lse + member * queries, delta + member * queries,
            tile, q_row, grad_row, scale * LOG2E, queries, D, DV, D_PAD, DV_PAD, ROWS, COLUMNS, PRECISION, True,
        )  # fmt: skip
    wholly = mixed - plain
    for index in range(GROUP * wholly):
        member, tile = (index // wholly).to(tl.int64), plain + index % wholly
        sums_k, sums_v = _key_tile(
            key, value, low, high, sums_k, sums_v,
            q + member * q_head, grad + member * grad_head, lse + member * queries, delta + member * queries,
            tile, q_row, grad_row, scale * LOG2E, queries, D, DV, D_PAD, DV_PAD, ROWS, COLUMNS, PRECISION, False,
        )  # fmt: skip
    store_rows(grad_k + batch * gk_batch + head * gk_head, start, gk_row, keys, sums_k * scale, D, D_PAD, COLUMNS)
    store_rows(grad_v + batch * gv_batch + head * gv_head, start, gv_row, keys, sums_v, DV, DV_PAD, COLUMNS)
