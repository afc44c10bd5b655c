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
def _rows(depth, height, width, samples, config: tl.constexpr):
    """The program's rows: (row number, head, cell, does it exist), [R] each.

    A cell is (sample, z, y, x).
    """
    program = tl.program_id(0)
    if config.int64_indices:
        program, samples = program.to(tl.int64), samples.to(tl.int64)
    row = program * config.rows + tl.arange(0, config.rows)
    exists = row < samples * depth * height * width * config.heads
    cell = row // config.heads
    rest, x = divided(cell, width)
    rest, y = divided(rest, height)
    sample, z = divided(rest, depth)
    return row, row % config.heads, (sample, z, y, x), exists


@triton.jit
def _neighbour(o, head, cell, exists, depth, height, width, config: tl.constexpr):
    """Row numbers of the neighbours at offset ``o`` of the window, and which are inside."""
    oz = o // (config.y.size * config.x.size)
    oy, ox = o // config.x.size % config.y.size, o % config.x.size
    sample, z, y, x = cell
    z, in_z = border(z + oz - config.z.size // 2, depth, config.padding, config.z.near)
    y, in_y = border(y + oy - config.y.size // 2, height, config.padding, config.y.near)
    x, in_x = border(x + ox - config.x.size // 2, width, config.padding, config.x.near)
    cell = ((sample * depth + z) * height + y) * width + x
    return cell * config.heads + head, exists & in_z & in_y & in_x


@triton.jit
def _load(ptr, row, exists, config: tl.constexpr):
    """Vectors of rows, [R, BD] float32; 0 where there is none."""
    column = tl.arange(0, config.block_d)[None, :]
    mask = exists[:, None] & (column < config.head_size)
    at = ptr + row[:, None] * config.head_size + column
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, exists, value, config: tl.constexpr):
    column = tl.arange(0, config.block_d)[None, :]
    mask = exists[:, None] & (column < config.head_size)
    at = ptr + row[:, None] * config.head_size + column
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_forward(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr,
    depth, height, width, samples,
    config: tl.constexpr,
):  # fmt: skip
    """The output ``[cells, heads, d]`` and the log-sum-exp ``[cells, heads]`` of the logits."""
    row, head, cell, exists = _rows(depth, height, width, samples, config)
    query = _load(query_ptr, row, exists, config) * config.scale
    # A cell is its own neighbour: its logit is a finite start for the maximum.
    highest = tl.sum(query * _load(key_ptr, row, exists, config), axis=1)
    total = highest * 0
    mixed = tl.zeros((config.rows, config.block_d), tl.float32)
    for o in range(0, config.window):
        other, inside = _neighbour(o, head, cell, exists, depth, height, width, config)
        logits = tl.sum(query * _load(key_ptr, other, inside, config), axis=1)
        new = tl.where(inside, tl.maximum(highest, logits), highest)
        rescale = tl.exp(highest - new)
        weight = tl.where(inside, tl.exp(logits - new), 0.0)
        total = rescale * total + weight
        mixed = rescale[:, None] * mixed + weight[:, None] * _load(value_ptr, other, inside, config)
        highest = new
    total = tl.where(exists, total, 1.0)
    _store(out_ptr, row, exists, mixed / total[:, None], config)
    tl.store(lse_ptr + row, highest + tl.log(total), mask=exists)


@triton.jit
def attention_backward_query(
    query_ptr, key_ptr, value_ptr, lse_ptr, cotangent_ptr, d_query_ptr, delta_ptr,
    depth, height, width, samples,
    config: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and each row's ``delta``, the cotangent times the output."""
    row, head, cell, exists = _rows(depth, height, width, samples, config)
    query = _load(query_ptr, row, exists, config) * config.scale
    cotangent = _load(cotangent_ptr, row, exists, config)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    delta = lse * 0
    with_value = tl.zeros((config.rows, config.block_d), tl.float32)
    without = tl.zeros((config.rows, config.block_d), tl.float32)
    for o in range(0, config.window):
        other, inside = _neighbour(o, head, cell, exists, depth, height, width, config)
        key = _load(key_ptr, other, inside, config)
        weight = tl.where(inside, tl.exp(tl.sum(query * key, axis=1) - lse), 0.0)
        share = weight * tl.sum(cotangent * _load(value_ptr, other, inside, config), axis=1)
        delta += share
        with_value += share[:, None] * key
        without += weight[:, None] * key
    _store(d_query_ptr, row, exists, config.scale * (with_value - delta[:, None] * without), config)
    tl.store(delta_ptr + row, delta, mask=exists)


@triton.jit
def attention_backward_key_value(
    query_ptr, key_ptr, value_ptr, lse_ptr, cotangent_ptr, delta_ptr, d_key_ptr, d_value_ptr,
    depth, height, width, samples,
    config: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values: a cell's neighbours are also those that attend to it."""
    row, head, cell, exists = _rows(depth, height, width, samples, config)
    key, value = _load(key_ptr, row, exists, config), _load(value_ptr, row, exists, config)
    d_key = tl.zeros((config.rows, config.block_d), tl.float32)
    d_value = tl.zeros((config.rows, config.block_d), tl.float32)
    for o in range(0, config.window):
        other, inside = _neighbour(o, head, cell, exists, depth, height, width, config)
        query = _load(query_ptr, other, inside, config) * config.scale
        cotangent = _load(cotangent_ptr, other, inside, config)
        lse = tl.load(lse_ptr + other, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + other, mask=inside, other=0.0)
        weight = tl.where(inside, tl.exp(tl.sum(query * key, axis=1) - lse), 0.0)
        d_logit = weight * (tl.sum(cotangent * value, axis=1) - delta)
        d_key += d_logit[:, None] * query
        d_value += weight[:, None] * cotangent
    _store(d_key_ptr, row, exists, d_key, config)
    _store(d_value_ptr, row, exists, d_value, config)
