"""Pieces of kernels that deal with the MLP: activations, products, layers forward and backward.

The first layer sees parts and sources. Parts are the filters of the stencil, held in registers: one
each, or side by side in a single block with a column of ones, whose weights are the bias. Sources
are read from memory a block at a time: a given perception, inputs. ``g`` is the
:class:`Constants` of the call.
"""

import triton
import triton.language as tl

# ---- activations ----


@triton.jit
def tanh(x):
    """Without the library's tanh, which not every back end of Triton has."""
    small = x * x
    small = x * (1 + small * (-1.0 / 3 + small * (2.0 / 15 - small * (17.0 / 315))))
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def _gelu_inner(x):
    return tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, name: tl.constexpr, g: tl.constexpr):
    if name == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # else NaN becomes 0
    elif name == "gelu":
        x = 0.5 * x * (1 + _gelu_inner(x))
    elif name == "silu":
        x = x * tl.sigmoid(x)
    elif name == "tanh":
        x = tanh(x)
    elif name == "elu":
        x = tl.where(x > 0, x, tl.exp(x) - 1)
    elif name == "leaky_relu":
        x = tl.where(x >= 0, x, g.negative_slope * x)
    else:
        tl.static_assert(name == "identity", "the Triton kernels lack an activation")
    return x


@triton.jit
def activate_backward(x, d, name: tl.constexpr, g: tl.constexpr):
    """The gradient before the activation at ``x``, given that after it."""
    if name == "relu":
        d = tl.where(x > 0, d, 0.0)
    elif name == "gelu":
        t = _gelu_inner(x)
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        d = d * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope)
    elif name == "silu":
        s = tl.sigmoid(x)
        d = d * (s + x * s * (1 - s))
    elif name == "tanh":
        t = tanh(x)
        d = d * (1 - t * t)
    elif name == "elu":
        d = tl.where(x > 0, d, d * tl.exp(x))
    elif name == "leaky_relu":
        d = tl.where(x >= 0, d, g.negative_slope * d)
    else:
        tl.static_assert(name == "identity", "the Triton kernels lack an activation's gradient")
    return d


# ---- products ----


# Adds half of TF32's last bit, but not to infinities and NaN, of which it would make others.
_ADD_HALF = tl.constexpr(
    "{ .reg .pred finite; .reg .f32 size; abs.f32 size, $1; setp.lt.f32 finite, size, 0f7F800000; "
    "mov.b32 $0, $1; @finite add.u32 $0, $0, 4096; }"
)


@triton.jit
def _by_instruction(asm: tl.constexpr, x):
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded(x, g: tl.constexpr):
    """An operand of products, to the nearest TF32: they cut off the bits that it has more.

    Weights are rounded where they are packed. Gradients of hidden layers are not: see docs/gpu.md.
    """
    if g.precision == "tf32":
        x = _by_instruction("cvt.rn.tf32.f32 $0, $1;" if g.hopper else _ADD_HALF, x)
    return x


@triton.jit
def dot(a, b, acc, g: tl.constexpr):
    """``acc + a @ b`` at the rule's precision, accumulated in float32; operands :func:`rounded`."""
    if g.precision == "bfloat16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=g.precision)
    return acc


@triton.jit
def _swapped(x):
    """Columns 8a + 2b + c to 8a + 4c + b."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2))
    x = tl.permute(x, (0, 1, 3, 2))
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]))


@triton.jit
def dot_result(x, w, acc, g: tl.constexpr):
    """:func:`dot`, where ``x`` [R, N] came out of a product.

    NVIDIA's products of TF32 want their left side's columns in other threads than those that they
    leave their results in. So the sum runs over columns in an order that makes them the same.
    """
    if g.precision == "tf32" or g.precision == "tf32x3":
        x, w = _swapped(x), tl.trans(_swapped(tl.trans(w)))
    return dot(x, w, acc, g)


@triton.jit
def load_block(ptr, row, column, stride: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """A block [M, N] of a row-major matrix that is padded to whole blocks."""
    rows, columns = row + tl.arange(0, M)[:, None], column + tl.arange(0, N)[None, :]
    return tl.load(ptr + rows * stride + columns)


@triton.jit
def add_block(ptr, row, column, stride: tl.constexpr, value):
    """Adds a block [M, N] to this program's own partial sums in memory."""
    rows = row + tl.arange(0, value.shape[0])[:, None]
    at = ptr + rows * stride + (column + tl.arange(0, value.shape[1])[None, :])
    tl.store(at, tl.load(at) + value)


@triton.jit
def add_vector(ptr, column, value):
    at = ptr + column + tl.arange(0, value.shape[0])
    tl.store(at, tl.load(at) + value)


@triton.jit
def source_rows(ptr, row, exists, k, size: tl.constexpr, g: tl.constexpr):
    """Columns k .. k + BS of the rows [R] of a source ``[*, size]``: [R, BS]."""
    column = k + tl.arange(0, g.block_s)[None, :]
    at = ptr + row[:, None] * size + column
    x = tl.load(at, mask=exists[:, None] & (column < size), other=0.0).to(tl.float32)
    return rounded(x, g)


# ---- forward ----


@triton.jit
def hidden(z, g: tl.constexpr):
    """A hidden layer's values, :func:`rounded`."""
    if g.activation == "relu" and g.precision == "tf32" and g.hopper:
        h = _by_instruction("cvt.rn.relu.tf32.f32 $0, $1;", z)
    else:
        h = rounded(activate(z, g.activation, g), g)
    return h


@triton.jit
def first_bias(weights_ptr, n, N: tl.constexpr, g: tl.constexpr):
    """What the first layer's sum begins with: its bias, unless a part of ones brings that."""
    acc = tl.zeros((g.rows, N), tl.float32)
    if not g.ones:
        acc += tl.load(weights_ptr + g.bias_at[0] + n + tl.arange(0, N))[None, :]
    return acc


@triton.jit
def first_layer(parts, sources, row, exists, weights_ptr, n, N: tl.constexpr, g: tl.constexpr):
    """Outputs n .. n + N of the first layer before its activation: [R, N].

    ``parts``: of the stencil, activated, [R, part] each. ``sources``: pointers to the given
    perception and to the inputs; ``row``: for each the row of every cell [R].
    """
    stride: tl.constexpr = g.padded_widths[0]
    acc = first_bias(weights_ptr, n, N, g)
    for i in tl.static_range(g.parts):
        w = load_block(weights_ptr + g.weight_at[0], i * g.part, n, stride, g.part, N)
        acc = dot(parts[i], w, acc, g)
    for s in tl.static_range(2):
        for k in range(0, g.source_sizes[s], g.block_s):
            x = source_rows(sources[s], row[s], exists, k, g.source_sizes[s], g)
            ws = load_block(weights_ptr + g.source_at[s], k, n, stride, g.block_s, N)
            acc = dot(x, ws, acc, g)
    return acc


@triton.jit
def hidden_before(layer: tl.constexpr, scratch_ptr, weights_ptr, n, g: tl.constexpr):
    """Outputs n .. n + BH of hidden ``layer`` > 0 before its activation: [R, BH]."""
    stride: tl.constexpr = g.padded_widths[layer]
    inputs: tl.constexpr = g.padded_widths[layer - 1]
    bias = tl.load(weights_ptr + g.bias_at[layer] + n + tl.arange(0, g.block_h))
    acc = tl.broadcast_to(bias[None, :], (g.rows, g.block_h))
    for k in range(0, inputs, g.block_h):
        z = load_block(scratch_ptr + g.hidden_at[layer - 1], 0, k, inputs, g.rows, g.block_h)
        w = load_block(weights_ptr + g.weight_at[layer], k, n, stride, g.block_h, g.block_h)
        acc = dot(hidden(z, g), w, acc, g)
    return acc


@triton.jit
def hidden_layer(
    layer: tl.constexpr, parts, sources, row, exists, scratch_ptr, weights_ptr, n, g: tl.constexpr
):
    if layer == 0:
        z = first_layer(parts, sources, row, exists, weights_ptr, n, g.block_h, g)
    else:
        z = hidden_before(layer, scratch_ptr, weights_ptr, n, g)
    return z


@triton.jit
def keep_hidden(parts, sources, row, exists, scratch_ptr, weights_ptr, g: tl.constexpr):
    """All hidden layers but the last, before their activation, to scratch."""
    if g.layers > 2:
        tl.debug_barrier()  # others may still read those of the block of rows before
    for layer in tl.static_range(g.layers - 2):
        for n in range(0, g.padded_widths[layer], g.block_h):
            z = hidden_layer(layer, parts, sources, row, exists, scratch_ptr, weights_ptr, n, g)
            rows = tl.arange(0, g.rows)[:, None] * g.padded_widths[layer]
            at = scratch_ptr + g.hidden_at[layer] + rows + (n + tl.arange(0, g.block_h)[None, :])
            tl.store(at, z)
        tl.debug_barrier()  # the next layer's threads read what these wrote


@triton.jit
def held_weights(weights_ptr, g: tl.constexpr):
    """What a program loads once, and its products keep in shared memory: those of two layers.

    Of the first layer for each part [part, BH], of the last [BH, BC]; or nothing.
    """
    held = ()
    if g.held:
        N: tl.constexpr = g.padded_widths[0]
        for i in tl.static_range(g.parts):
            held = held + (load_block(weights_ptr + g.weight_at[0], i * g.part, 0, N, g.part, N),)
        held = held + (load_block(weights_ptr + g.weight_at[1], 0, 0, g.block_c, N, g.block_c),)
    return held


@triton.jit
def _held_mlp(parts, weights_ptr, held, g: tl.constexpr):
    N: tl.constexpr = g.padded_widths[0]
    z = first_bias(weights_ptr, 0, N, g)
    for i in tl.static_range(g.parts):
        z = dot(parts[i], held[i], z, g)
    bias = load_block(weights_ptr + g.bias_at[1], 0, 0, g.block_c, 1, g.block_c)
    u = tl.broadcast_to(bias, (g.rows, g.block_c))
    return dot_result(hidden(z, g), held[g.parts], u, g)


@triton.jit
def mlp(parts, sources, row, exists, scratch_ptr, weights_ptr, held, g: tl.constexpr):
    """The update of R cells: [R, BC]."""
    last: tl.constexpr = g.layers - 1
    if g.held:
        u = _held_mlp(parts, weights_ptr, held, g)
    elif last == 0:
        u = first_layer(parts, sources, row, exists, weights_ptr, 0, g.block_c, g)
    else:
        keep_hidden(parts, sources, row, exists, scratch_ptr, weights_ptr, g)
        bias = tl.load(weights_ptr + g.bias_at[last] + tl.arange(0, g.block_c))
        u = tl.broadcast_to(bias[None, :], (g.rows, g.block_c))
        for n in range(0, g.padded_widths[last - 1], g.block_h):
            z = hidden_layer(last - 1, parts, sources, row, exists, scratch_ptr, weights_ptr, n, g)
            w = load_block(weights_ptr + g.weight_at[last], n, 0, g.block_c, g.block_h, g.block_c)
            u = dot_result(hidden(z, g), w, u, g)
    return u


# ---- backward ----


@triton.jit
def _outer(x, d, g: tl.constexpr):
    """``x.T @ d``: the rows' share of a weight's gradient."""
    return dot(tl.trans(x), d, tl.zeros((x.shape[1], d.shape[1]), tl.float32), g)


@triton.jit
def _row_sum(d, g: tl.constexpr):
    """The sum of rows, [R, N] to [N]."""
    if g.precision == "tf32x3" or g.precision == "ieee":
        total = tl.sum(d, axis=0)
    else:  # as a product: tensor cores have ``d`` at hand for others
        ones = tl.full((d.shape[0], 16), 1.0, tl.float32)
        total = tl.sum(_outer(d, ones, g), axis=1) * (1.0 / 16)
    return total


@triton.jit
def first_layer_backward(
    dz, n, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr, d_sources, g: tl.constexpr
):
    """Adds what outputs n .. n + N of the first layer, dz [R, N], mean to parts and sources."""
    stride: tl.constexpr = g.padded_widths[0]
    N: tl.constexpr = dz.shape[1]
    new = ()
    for i in tl.static_range(g.parts):
        w = load_block(weights_ptr + g.weight_at[0], i * g.part, n, stride, g.part, N)
        new = new + (dot_result(dz, tl.trans(w), d_parts[i], g),)
        if g.weight_grad:
            # On the left whichever is wide, as Hopper's products want it.
            dw = _outer(parts[i], dz, g) if g.joined else tl.trans(_outer(dz, parts[i], g))
            add_block(grads_ptr + g.weight_at[0], i * g.part, n, stride, dw)
    for s in tl.static_range(2):
        for k in range(0, g.source_sizes[s], g.block_s):
            if g.weight_grad:
                x = source_rows(sources[s], row[s], exists, k, g.source_sizes[s], g)
                add_block(grads_ptr + g.source_at[s], k, n, stride, _outer(x, dz, g))
            if g.source_grad[s]:
                ws = load_block(weights_ptr + g.source_at[s], k, n, stride, g.block_s, N)
                dx = dot_result(dz, tl.trans(ws), tl.zeros((g.rows, g.block_s), tl.float32), g)
                _add_source_rows(d_sources[s], row[2], exists, k, dx, g.source_sizes[s])
    if g.weight_grad and not g.ones:
        add_vector(grads_ptr + g.bias_at[0], n, _row_sum(dz, g))
    return new


@triton.jit
def _add_source_rows(ptr, row, exists, k, value, size: tl.constexpr):
    column = k + tl.arange(0, value.shape[1])[None, :]
    at = ptr + row[:, None] * size + column
    mask = exists[:, None] & (column < size)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def carried_sums(g: tl.constexpr):
    """Where a program carries its gradients of the weights in registers: zeros for them.

    Of the first layer [BH, part], of the last [BH, BC] and of its bias [BC]; or nothing.
    """
    sums = ()
    if g.carried:
        N: tl.constexpr = g.padded_widths[0]
        sums = (
            tl.zeros((N, g.part), tl.float32),
            tl.zeros((N, g.block_c), tl.float32),
            tl.zeros((g.block_c,), tl.float32),
        )
    return sums


@triton.jit
def keep_carried(sums, grads_ptr, g: tl.constexpr):
    """Writes what a program carried to its partial sums in memory."""
    if g.carried:
        N: tl.constexpr = g.padded_widths[0]
        tl.debug_barrier()  # others have cleared the same sums, or added to them
        add_block(grads_ptr + g.weight_at[0], 0, 0, N, tl.trans(sums[0]))
        add_block(grads_ptr + g.weight_at[1], 0, 0, g.block_c, sums[1])
        add_vector(grads_ptr + g.bias_at[1], 0, sums[2])


@triton.jit
def _carried_mlp_backward(
    du, parts, sources, row, exists, weights_ptr, grads_ptr, sums, g: tl.constexpr
):
    """:func:`mlp_backward` of two layers without sources, whose hidden units are one block."""
    N: tl.constexpr = g.padded_widths[0]
    d_first, d_last, d_bias = sums
    z = first_layer(parts, sources, row, exists, weights_ptr, 0, N, g)
    w_last = load_block(weights_ptr + g.weight_at[1], 0, 0, g.block_c, N, g.block_c)
    d_out = rounded(du, g)
    dh = dot(d_out, tl.trans(w_last), tl.zeros((g.rows, N), tl.float32), g)
    dz = activate_backward(z, dh, g.activation, g)
    d_last = dot(tl.trans(hidden(z, g)), d_out, d_last, g)
    d_bias += tl.sum(du, axis=0)
    d_first = dot(tl.trans(dz), parts[0], d_first, g)
    if not g.ones:
        add_vector(grads_ptr + g.bias_at[0], 0, _row_sum(dz, g))
    w_first = load_block(weights_ptr + g.weight_at[0], 0, 0, N, g.part, N)
    d_part = dot_result(dz, tl.trans(w_first), tl.zeros((g.rows, g.part), tl.float32), g)
    return (d_part,), (d_first, d_last, d_bias)


@triton.jit
def mlp_backward(
    du, parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr, d_sources, sums,
    g: tl.constexpr,
):  # fmt: skip
    """From the gradient of the update, du [R, BC], to those of the parts, a tuple of [R, part].

    ``row``: rows of the two sources, and of their gradients, which are per cell. Adds up the
    gradients of the weights, in memory or in ``sums``, see :func:`carried_sums`: they are the
    second result.
    """
    if g.carried:
        d_parts, sums = _carried_mlp_backward(
            du, parts, sources, row, exists, weights_ptr, grads_ptr, sums, g
        )
    else:
        d_parts = _mlp_backward(
            du, parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr, d_sources, g
        )
    return d_parts, sums


@triton.jit
def _mlp_backward(
    du, parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr, d_sources,
    g: tl.constexpr,
):  # fmt: skip
    last: tl.constexpr = g.layers - 1
    d_parts = ()
    for _ in tl.static_range(g.parts):
        d_parts = d_parts + (tl.zeros((g.rows, g.part), tl.float32),)
    if last == 0:
        d_parts = first_layer_backward(
            rounded(du, g), 0, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr,
            d_sources, g,
        )  # fmt: skip
    else:
        keep_hidden(parts, sources, row, exists, scratch_ptr, weights_ptr, g)
        if g.weight_grad:
            add_vector(grads_ptr + g.bias_at[last], 0, tl.sum(du, axis=0))
        for n in range(0, g.padded_widths[last - 1], g.block_h):
            z = hidden_layer(last - 1, parts, sources, row, exists, scratch_ptr, weights_ptr, n, g)
            h = hidden(z, g)
            w = load_block(weights_ptr + g.weight_at[last], n, 0, g.block_c, g.block_h, g.block_c)
            d_out = rounded(du, g)
            dh = dot(d_out, tl.trans(w), tl.zeros((g.rows, g.block_h), tl.float32), g)
            dz = activate_backward(z, dh, g.activation, g)
            if g.weight_grad:
                add_block(grads_ptr + g.weight_at[last], n, 0, g.block_c, _outer(h, d_out, g))
            if last == 1:
                d_parts = first_layer_backward(
                    dz, n, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr,
                    d_sources, g,
                )  # fmt: skip
            else:
                _keep_gradient(last - 1, dz, n, scratch_ptr, grads_ptr, g)
        for i in tl.static_range(g.layers - 2):
            tl.debug_barrier()  # these threads read the gradients that others wrote
            d_parts = _hidden_layer_backward(
                last - 1 - i, parts, d_parts, sources, row, exists, scratch_ptr, weights_ptr,
                grads_ptr, d_sources, g,
            )  # fmt: skip
    return d_parts


@triton.jit
def _keep_gradient(layer: tl.constexpr, dz, n, scratch_ptr, grads_ptr, g: tl.constexpr):
    """The gradient before the activation of hidden ``layer`` to scratch, its bias's added."""
    rows = tl.arange(0, g.rows)[:, None] * g.padded_widths[layer]
    tl.store(scratch_ptr + g.gradient_at[layer] + rows + (n + tl.arange(0, g.block_h)[None, :]), dz)
    if g.weight_grad:
        add_vector(grads_ptr + g.bias_at[layer], n, tl.sum(dz, axis=0))


@triton.jit
def _hidden_layer_backward(
    layer: tl.constexpr, parts, d_parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr,
    d_sources, g: tl.constexpr,
):  # fmt: skip
    """From the gradient of hidden ``layer`` > 0, in scratch, to that of the one before it."""
    inputs: tl.constexpr = g.padded_widths[layer - 1]
    stride: tl.constexpr = g.padded_widths[layer]
    for k in range(0, inputs, g.block_h):
        z = load_block(scratch_ptr + g.hidden_at[layer - 1], 0, k, inputs, g.rows, g.block_h)
        h = hidden(z, g)
        dh = tl.zeros((g.rows, g.block_h), tl.float32)
        for n in range(0, stride, g.block_h):
            d = load_block(scratch_ptr + g.gradient_at[layer], 0, n, stride, g.rows, g.block_h)
            w = load_block(weights_ptr + g.weight_at[layer], k, n, stride, g.block_h, g.block_h)
            dh = dot(d, tl.trans(w), dh, g)
            if g.weight_grad:
                add_block(grads_ptr + g.weight_at[layer], k, n, stride, _outer(h, d, g))
        dz = activate_backward(z, dh, g.activation, g)
        if layer == 1:
            d_parts = first_layer_backward(
                dz, k, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr, d_sources, g
            )
        else:
            _keep_gradient(layer - 1, dz, k, scratch_ptr, grads_ptr, g)
    return d_parts
