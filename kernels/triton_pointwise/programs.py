"""The kernels."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_forward(x, weight, out, scale, width, eps, WIDTH: tl.constexpr):
    """One row of x [N,width]: out = x * scale * weight with scale [N] = 1 / rms."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (value * inverse * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, inverse)


@triton.jit
def rms_norm_backward(grad, x, weight, scale, grad_x, parts, rows, width, each, WIDTH: tl.constexpr):
    """`each` rows in order: their grad_x, and the sum of their shares of the weight's gradient, a row of parts [programs,width]."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for index in range(each):
        row = program * each + index
        here = inside & (row + 0 * column < rows)  # as vectors: the interpreter takes no mask made of a scalar
        place = row.to(tl.int64) * width + column
        inverse = tl.load(scale + tl.minimum(row, rows - 1))
        slope = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
        normed = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * inverse
        mean = tl.sum(slope * factor * normed, 0) / width
        tl.store(grad_x + place, ((slope * factor - normed * mean) * inverse).to(grad_x.dtype.element_ty), mask=here)
        total += slope * normed
    tl.store(parts + program.to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def rope_turn(
    x, cos, sin, out, x_batch, x_head, x_row, out_batch, out_head, out_row, turn_batch, heads, rows, half,
    BACK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head of x [B,H,S,2*half], turned by cos and sin [B or 1,1,S,2*half]; BACK: the transposed turn."""
    line, start = tl.program_id(0) // tl.cdiv(rows, ROWS), tl.program_id(0) % tl.cdiv(rows, ROWS) * ROWS
    batch, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    row, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (row < rows) & (column < half)
    x += batch * x_batch + head * x_head
    out += batch * out_batch + head * out_head
    turn = batch * turn_batch + row.to(tl.int64) * (2 * half) + column
    first = tl.load(x + row.to(tl.int64) * x_row + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + row.to(tl.int64) * x_row + column + half, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + turn + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + turn + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        new_first, new_second = first * cos_first + second * sin_second, second * cos_second - first * sin_first
    else:
        new_first, new_second = first * cos_first - second * sin_first, second * cos_second + first * sin_second
    place = row.to(tl.int64) * out_row + column
    tl.store(out + place, new_first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + half, new_second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr):
    """silu(gate) * up, element by element."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    """Both gradients; the sigmoid is computed again."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    tl.store(grad_up + place, (slope * g * share).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate + place, (slope * u * share * (1.0 + g * (1.0 - share))).to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit
def softmax_losses(logits, target, losses, stride, width, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits [n,width]: losses[row] = -log softmax(row)[target[row]], and with SLOPE its gradient in place of the row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    column = tl.arange(0, BLOCK)
    wanted = tl.load(target + row)
    # Before the sums below, behind which all warps wait: the gradient overwrites it.
    chosen = tl.load(logits + tl.maximum(tl.minimum(wanted, width - 1), 0)).to(tl.float32)
    # Each lane keeps a sum relative to the largest number that it has met; the first is finite, as infinities have no difference.
    top, total = tl.full([BLOCK], -3.0e38, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.load(logits + start + column, mask=start + column < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(top, value)
        total = total * tl.exp(top - larger) + tl.exp(value - larger)
        top = larger
    most = tl.max(top, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
    tl.store(losses + row, tl.where((wanted >= 0) & (wanted < width), lse - chosen, float("nan")))
    if SLOPE:
        for start in range(0, width, BLOCK):
            inside = start + column < width
            value = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32)
            slope = tl.exp(value - lse) - tl.where(start + column == wanted, 1.0, 0.0)
            tl.store(logits + start + column, slope.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def sum_copies(rows, places, probs, out, width, copies, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of out[n] = sum over slots, in order, of rows[places[n,slot]], times probs[n,slot] if WEIGHED."""
    blocks = tl.cdiv(width, BLOCK)
    token, column = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(copies):
        place = tl.load(places + token * copies + slot)
        value = tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHED:
            value *= tl.load(probs + token * copies + slot).to(tl.float32)
        total += value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def spread_copies(grad, rows, places, probs, grad_rows, grad_probs, width, copies, BLOCK: tl.constexpr):
    """One copy of a token, of a weighed sum with gradient grad: the gradients of its row and of its prob."""
    copy = tl.program_id(0).to(tl.int64)
    token, place = copy // copies, tl.load(places + copy)
    share = tl.load(probs + copy).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        slope = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
        total += slope * tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_rows + place * width + column, (slope * share).to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_probs + copy, tl.sum(total, 0).to(grad_probs.dtype.element_ty))
