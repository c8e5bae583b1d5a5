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
