"""The kernels of ``neighborhood_attention``.

A row is one head of one cell; a program works on a block of rows and meets their neighbours one
offset of the window at a time. Forward: a running softmax. Backward: one kernel goes around the
cells that attend, one around those attended to; both take the weights from the logits and their
log-sum-exp, and neither scatters. Formulas: ``backends/xla/attention.py``.
"""

import triton
import triton.language as tl

from nca_kernels.backends.triton.cells import border, divided


@triton.jit
def _rows(depth, height, width, samples, g: tl.constexpr):
    """The program's rows: (row number, head, cell, does it exist), [R] each.

    A cell is (sample, z, y, x).
    """
    program = tl.program_id(0)
    if g.wide:
        program, samples = program.to(tl.int64), samples.to(tl.int64)
    row = program * g.rows + tl.arange(0, g.rows)
    exists = row < samples * depth * height * width * g.heads
    cell = row // g.heads
    rest, x = divided(cell, width)
    rest, y = divided(rest, height)
    sample, z = divided(rest, depth)
    return row, row % g.heads, (sample, z, y, x), exists


@triton.jit
def _neighbour(o, head, cell, exists, depth, height, width, g: tl.constexpr):
    """Row numbers of the neighbours at offset ``o`` of the window, and which are inside."""
    oz, oy, ox = o // (g.window_y * g.window_x), o // g.window_x % g.window_y, o % g.window_x
    sample, z, y, x = cell
    z, in_z = border(z + oz - g.window_z // 2, depth, g.padding, g.near_z)
    y, in_y = border(y + oy - g.window_y // 2, height, g.padding, g.near_y)
    x, in_x = border(x + ox - g.window_x // 2, width, g.padding, g.near_x)
    cell = ((sample * depth + z) * height + y) * width + x
    return cell * g.heads + head, exists & in_z & in_y & in_x


@triton.jit
def _load(ptr, row, exists, g: tl.constexpr):
    """Vectors of rows, [R, BD] float32; 0 where there is none."""
    column = tl.arange(0, g.block_d)[None, :]
    mask = exists[:, None] & (column < g.head_size)
    at = ptr + row[:, None] * g.head_size + column
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, exists, value, g: tl.constexpr):
    column = tl.arange(0, g.block_d)[None, :]
    mask = exists[:, None] & (column < g.head_size)
    at = ptr + row[:, None] * g.head_size + column
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_forward(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr,
    depth, height, width, samples,
    g: tl.constexpr,
):  # fmt: skip
    """The output ``[cells, heads, d]`` and the log-sum-exp ``[cells, heads]`` of the logits."""
    row, head, cell, exists = _rows(depth, height, width, samples, g)
    query = _load(query_ptr, row, exists, g) * g.scale
    # A cell is its own neighbour: its logit is a finite start for the maximum.
    highest = tl.sum(query * _load(key_ptr, row, exists, g), axis=1)
    total = highest * 0
    mixed = tl.zeros((g.rows, g.block_d), tl.float32)
    for o in range(0, g.window):
        other, inside = _neighbour(o, head, cell, exists, depth, height, width, g)
        logits = tl.sum(query * _load(key_ptr, other, inside, g), axis=1)
        new = tl.where(inside, tl.maximum(highest, logits), highest)
        kept = tl.exp(highest - new)
        weight = tl.where(inside, tl.exp(logits - new), 0.0)
        total = kept * total + weight
        mixed = kept[:, None] * mixed + weight[:, None] * _load(value_ptr, other, inside, g)
        highest = new
    total = tl.where(exists, total, 1.0)
    _store(out_ptr, row, exists, mixed / total[:, None], g)
    tl.store(lse_ptr + row, highest + tl.log(total), mask=exists)


@triton.jit
def attention_backward_query(
    query_ptr, key_ptr, value_ptr, lse_ptr, cotangent_ptr, d_query_ptr, delta_ptr,
    depth, height, width, samples,
    g: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and each row's ``delta``, the cotangent times the output."""
    row, head, cell, exists = _rows(depth, height, width, samples, g)
    query = _load(query_ptr, row, exists, g) * g.scale
    given = _load(cotangent_ptr, row, exists, g)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    delta = lse * 0
    with_value = tl.zeros((g.rows, g.block_d), tl.float32)
    without = tl.zeros((g.rows, g.block_d), tl.float32)
    for o in range(0, g.window):
        other, inside = _neighbour(o, head, cell, exists, depth, height, width, g)
        key = _load(key_ptr, other, inside, g)
        weight = tl.where(inside, tl.exp(tl.sum(query * key, axis=1) - lse), 0.0)
        share = weight * tl.sum(given * _load(value_ptr, other, inside, g), axis=1)
        delta += share
        with_value += share[:, None] * key
        without += weight[:, None] * key
    _store(d_query_ptr, row, exists, g.scale * (with_value - delta[:, None] * without), g)
    tl.store(delta_ptr + row, delta, mask=exists)


@triton.jit
def attention_backward_key_value(
    query_ptr, key_ptr, value_ptr, lse_ptr, cotangent_ptr, delta_ptr, d_key_ptr, d_value_ptr,
    depth, height, width, samples,
    g: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values: a cell's neighbours are also those that attend to it."""
    row, head, cell, exists = _rows(depth, height, width, samples, g)
    key, value = _load(key_ptr, row, exists, g), _load(value_ptr, row, exists, g)
    d_key = tl.zeros((g.rows, g.block_d), tl.float32)
    d_value = tl.zeros((g.rows, g.block_d), tl.float32)
    for o in range(0, g.window):
        other, inside = _neighbour(o, head, cell, exists, depth, height, width, g)
        query = _load(query_ptr, other, inside, g) * g.scale
        given = _load(cotangent_ptr, other, inside, g)
        lse = tl.load(lse_ptr + other, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + other, mask=inside, other=0.0)
        weight = tl.where(inside, tl.exp(tl.sum(query * key, axis=1) - lse), 0.0)
        d_logit = weight * (tl.sum(given * value, axis=1) - delta)
        d_key += d_logit[:, None] * query
        d_value += weight[:, None] * given
    _store(d_key_ptr, row, exists, d_key, g)
    _store(d_value_ptr, row, exists, d_value, g)
