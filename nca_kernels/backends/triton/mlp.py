"""Pieces of kernels that deal with the MLP: activations, products, layers forward and backward.

The first layer sees parts and sources. Parts are the filters of the stencil, held in registers: one
each, or side by side in a single block with columns of ones, whose weights are the bias. Sources
are read from memory a block at a time: a given perception, and inputs. ``config`` is always the
call's :class:`.step_configuration.StepConfiguration`.
"""

import triton
import triton.language as tl

# ---- activations ----


@triton.jit
def tanh(x):
    """tanh(x), without the library's function, which not every back end of Triton has."""
    small = x * x
    small = x * (1 + small * (-1.0 / 3 + small * (2.0 / 15 - small * (17.0 / 315))))
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def _gelu_inner(x):
    return tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, name: tl.constexpr, config: tl.constexpr):
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
        x = tl.where(x >= 0, x, config.negative_slope * x)
    else:
        tl.static_assert(name == "identity", "the Triton kernels lack an activation")
    return x


@triton.jit
def activate_backward(x, d, name: tl.constexpr, config: tl.constexpr):
    """The gradient before the activation at ``x``, from ``d``, the one after it."""
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
        d = tl.where(x >= 0, d, config.negative_slope * d)
    else:
        tl.static_assert(name == "identity", "the Triton kernels lack an activation's gradient")
    return d


# ---- products ----


# Adds half of TF32's last bit, except to infinities and NaN, which that would change.
_ADD_HALF = tl.constexpr(
    "{ .reg .pred finite; .reg .f32 size; abs.f32 size, $1; setp.lt.f32 finite, size, 0f7F800000; "
    "mov.b32 $0, $1; @finite add.u32 $0, $0, 4096; }"
)


@triton.jit
def _by_instruction(asm: tl.constexpr, x):
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded(x, config: tl.constexpr):
    """An operand of products, rounded to the nearest TF32: products would cut off its other bits.

    Weights are rounded where they are packed. Gradients of hidden layers are not: see docs/gpu.md.
    """
    if config.precision == "tf32":
        x = _by_instruction(
            "cvt.rn.tf32.f32 $0, $1;" if config.rounds_by_instruction else _ADD_HALF, x
        )
    return x


@triton.jit
def dot(a, b, acc, config: tl.constexpr):
    """``acc + a @ b`` at the rule's precision, accumulated in float32; operands :func:`rounded`."""
    if config.precision == "bfloat16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=config.precision)
    return acc


@triton.jit
def _swapped(x):
    """Columns 8a + 2b + c to 8a + 4c + b."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2))
    x = tl.permute(x, (0, 1, 3, 2))
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]))


@triton.jit
def dot_result(x, w, acc, config: tl.constexpr):
    """:func:`dot`, where ``x`` [R, N] came out of a product.

    NVIDIA's products of TF32 want the columns of their left side in other threads than they leave
    those of their results in. So the sum runs over columns in an order that makes them the same.
    """
    if config.precision == "tf32" or config.precision == "tf32x3":
        x, w = _swapped(x), tl.trans(_swapped(tl.trans(w)))
    return dot(x, w, acc, config)


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


# ---- what layers are made of ----


@triton.jit
def layer_block(
    weights_ptr, layer: tl.constexpr, k, n, M: tl.constexpr, N: tl.constexpr, config: tl.constexpr
):
    """Inputs k .. k + M and outputs n .. n + N of a layer's matrix: [M, N]."""
    stride: tl.constexpr = config.mlp.widths[layer]
    return load_block(weights_ptr + config.packed.weight_at[layer], k, n, stride, M, N)


@triton.jit
def part_block(weights_ptr, i, n, N: tl.constexpr, config: tl.constexpr):
    """Outputs n .. n + N of the first layer's matrix for a part of the perception: [part, N]."""
    part: tl.constexpr = config.perception.part
    return layer_block(weights_ptr, 0, i * part, n, part, N, config)


@triton.jit
def source_block(weights_ptr, s: tl.constexpr, k, n, N: tl.constexpr, config: tl.constexpr):
    """Outputs n .. n + N of the first layer's matrix for numbers k .. k + BS of a source."""
    at, stride = weights_ptr + config.packed.source_at[s], config.mlp.widths[0]
    return load_block(at, k, n, stride, config.mlp.block_s, N)


@triton.jit
def add_layer_block(grads_ptr, layer: tl.constexpr, k, n, value, config: tl.constexpr):
    """Adds to the gradient of a layer's matrix, see :func:`layer_block`."""
    stride: tl.constexpr = config.mlp.widths[layer]
    add_block(grads_ptr + config.packed.weight_at[layer], k, n, stride, value)


@triton.jit
def load_bias(weights_ptr, layer: tl.constexpr, n, N: tl.constexpr, config: tl.constexpr):
    """A layer's bias of outputs n .. n + N: [1, N]."""
    return tl.load(weights_ptr + config.packed.bias_at[layer] + n + tl.arange(0, N))[None, :]


@triton.jit
def source_rows(ptr, row, exists, k, size: tl.constexpr, config: tl.constexpr):
    """Columns k .. k + BS of the rows [R] of a source ``[*, size]``: [R, BS]."""
    column = k + tl.arange(0, config.mlp.block_s)[None, :]
    at = ptr + row[:, None] * size + column
    x = tl.load(at, mask=exists[:, None] & (column < size), other=0.0).to(tl.float32)
    return rounded(x, config)


@triton.jit
def _load_units(ptr, layer: tl.constexpr, n, config: tl.constexpr):
    """Units n .. n + BH of a hidden layer [R, width] in scratch: [R, BH]."""
    return load_block(ptr, 0, n, config.mlp.widths[layer], config.rows, config.mlp.block_h)


@triton.jit
def _store_units(ptr, layer: tl.constexpr, n, value, config: tl.constexpr):
    rows = tl.arange(0, config.rows)[:, None] * config.mlp.widths[layer]
    tl.store(ptr + rows + (n + tl.arange(0, config.mlp.block_h)[None, :]), value)


# ---- forward ----


@triton.jit
def hidden(z, config: tl.constexpr):
    """A hidden layer's values, :func:`rounded`."""
    if config.activation == "relu" and config.precision == "tf32" and config.rounds_by_instruction:
        h = _by_instruction("cvt.rn.relu.tf32.f32 $0, $1;", z)
    else:
        h = rounded(activate(z, config.activation, config), config)
    return h


@triton.jit
def first_bias(weights_ptr, n, N: tl.constexpr, config: tl.constexpr):
    """What the first layer's sum begins with: its bias, unless a part of ones brings that."""
    acc = tl.zeros((config.rows, N), tl.float32)
    if not config.perception.ones:
        acc += load_bias(weights_ptr, 0, n, N, config)
    return acc


@triton.jit
def first_layer(parts, sources, row, exists, weights_ptr, n, N: tl.constexpr, config: tl.constexpr):
    """Outputs n .. n + N of the first layer before its activation: [R, N].

    ``parts``: of the stencil, activated, [R, part] each. ``sources``: pointers to the given
    perception and to the inputs; ``row``: for each the row of every cell [R].
    """
    acc = first_bias(weights_ptr, n, N, config)
    for i in tl.static_range(config.perception.parts):
        acc = dot(parts[i], part_block(weights_ptr, i, n, N, config), acc, config)
    for s in tl.static_range(2):
        for k in range(0, config.mlp.source_sizes[s], config.mlp.block_s):
            x = source_rows(sources[s], row[s], exists, k, config.mlp.source_sizes[s], config)
            acc = dot(x, source_block(weights_ptr, s, k, n, N, config), acc, config)
    return acc


@triton.jit
def hidden_before(layer: tl.constexpr, scratch_ptr, weights_ptr, n, config: tl.constexpr):
    """Outputs n .. n + BH of hidden ``layer`` > 0 before its activation: [R, BH]."""
    BH: tl.constexpr = config.mlp.block_h
    bias = load_bias(weights_ptr, layer, n, BH, config)
    acc = tl.broadcast_to(bias, (config.rows, BH))
    for k in range(0, config.mlp.widths[layer - 1], BH):
        z = _load_units(scratch_ptr + config.scratch.hidden_at[layer - 1], layer - 1, k, config)
        w = layer_block(weights_ptr, layer, k, n, BH, BH, config)
        acc = dot(hidden(z, config), w, acc, config)
    return acc


@triton.jit
def hidden_layer(
    layer: tl.constexpr, parts, sources, row, exists, scratch_ptr, weights_ptr, n,
    config: tl.constexpr,
):  # fmt: skip
    """Outputs n .. n + BH of a hidden layer before its activation: [R, BH]."""
    if layer == 0:
        z = first_layer(parts, sources, row, exists, weights_ptr, n, config.mlp.block_h, config)
    else:
        z = hidden_before(layer, scratch_ptr, weights_ptr, n, config)
    return z


@triton.jit
def store_hidden(parts, sources, row, exists, scratch_ptr, weights_ptr, config: tl.constexpr):
    """All hidden layers but the last, before their activation, to scratch."""
    if config.mlp.layers > 2:
        tl.debug_barrier()  # others may still read those of the block of rows before
    for i in tl.static_range(config.mlp.layers - 2):
        for n in range(0, config.mlp.widths[i], config.mlp.block_h):
            z = hidden_layer(i, parts, sources, row, exists, scratch_ptr, weights_ptr, n, config)
            _store_units(scratch_ptr + config.scratch.hidden_at[i], i, n, z, config)
        tl.debug_barrier()  # the next layer's threads read what these wrote


@triton.jit
def load_weights_once(weights_ptr, config: tl.constexpr):
    """What a program loads once, and its products keep in shared memory: those of two layers.

    Of the first layer for each part [part, BH], of the last [BH, BC]; or nothing.
    """
    loaded = ()
    if config.weights_in_shared_memory:
        N: tl.constexpr = config.mlp.widths[0]
        for i in tl.static_range(config.perception.parts):
            loaded = loaded + (part_block(weights_ptr, i, 0, N, config),)
        loaded = loaded + (layer_block(weights_ptr, 1, 0, 0, N, config.block_c, config),)
    return loaded


@triton.jit
def _mlp_of_loaded(parts, weights_ptr, loaded, config: tl.constexpr):
    """:func:`mlp` with the weights of :func:`load_weights_once`."""
    BC: tl.constexpr = config.block_c
    z = first_bias(weights_ptr, 0, config.mlp.widths[0], config)
    for i in tl.static_range(config.perception.parts):
        z = dot(parts[i], loaded[i], z, config)
    bias = load_block(weights_ptr + config.packed.bias_at[1], 0, 0, BC, 1, BC)
    u = tl.broadcast_to(bias, (config.rows, BC))
    return dot_result(hidden(z, config), loaded[config.perception.parts], u, config)


@triton.jit
def mlp(parts, sources, row, exists, scratch_ptr, weights_ptr, loaded, config: tl.constexpr):
    """The update of R cells: [R, BC]."""
    BH: tl.constexpr = config.mlp.block_h
    BC: tl.constexpr = config.block_c
    last: tl.constexpr = config.mlp.layers - 1
    if config.weights_in_shared_memory:
        u = _mlp_of_loaded(parts, weights_ptr, loaded, config)
    elif last == 0:
        u = first_layer(parts, sources, row, exists, weights_ptr, 0, BC, config)
    else:
        store_hidden(parts, sources, row, exists, scratch_ptr, weights_ptr, config)
        u = tl.broadcast_to(load_bias(weights_ptr, last, 0, BC, config), (config.rows, BC))
        for n in range(0, config.mlp.widths[last - 1], BH):
            z = hidden_layer(
                last - 1, parts, sources, row, exists, scratch_ptr, weights_ptr, n, config
            )
            w = layer_block(weights_ptr, last, n, 0, BH, BC, config)
            u = dot_result(hidden(z, config), w, u, config)
    return u


# ---- backward ----


@triton.jit
def _outer(x, d, config: tl.constexpr):
    """``x.T @ d``: the rows' share of a weight's gradient."""
    return dot(tl.trans(x), d, tl.zeros((x.shape[1], d.shape[1]), tl.float32), config)


@triton.jit
def _row_sum(d, config: tl.constexpr):
    """The sum of rows, [R, N] to [N]."""
    if config.precision == "tf32x3" or config.precision == "ieee":
        total = tl.sum(d, axis=0)
    else:  # as a product: tensor cores have ``d`` at hand for others
        ones = tl.full((d.shape[0], 16), 1.0, tl.float32)
        total = tl.sum(_outer(d, ones, config), axis=1) * (1.0 / 16)
    return total


@triton.jit
def first_layer_backward(
    dz, n, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr, d_sources,
    config: tl.constexpr,
):  # fmt: skip
    """Adds what outputs n .. n + N of the first layer, dz [R, N], mean to parts and sources."""
    N: tl.constexpr = dz.shape[1]
    BS: tl.constexpr = config.mlp.block_s
    new = ()
    for i in tl.static_range(config.perception.parts):
        w = part_block(weights_ptr, i, n, N, config)
        new = new + (dot_result(dz, tl.trans(w), d_parts[i], config),)
        if config.wanted.weights:
            if config.perception.side_by_side:  # on the left whichever is wide: Hopper wants it so
                dw = _outer(parts[i], dz, config)
            else:
                dw = tl.trans(_outer(dz, parts[i], config))
            add_layer_block(grads_ptr, 0, i * config.perception.part, n, dw, config)
    for s in tl.static_range(2):
        for k in range(0, config.mlp.source_sizes[s], BS):
            if config.wanted.weights:
                x = source_rows(sources[s], row[s], exists, k, config.mlp.source_sizes[s], config)
                at, stride = grads_ptr + config.packed.source_at[s], config.mlp.widths[0]
                add_block(at, k, n, stride, _outer(x, dz, config))
            if config.wanted.sources[s]:
                w = source_block(weights_ptr, s, k, n, N, config)
                zeros = tl.zeros((config.rows, BS), tl.float32)
                dx = dot_result(dz, tl.trans(w), zeros, config)
                _add_source_rows(d_sources[s], row[2], exists, k, dx, config.mlp.source_sizes[s])
    if config.wanted.weights and not config.perception.ones:
        add_vector(grads_ptr + config.packed.bias_at[0], n, _row_sum(dz, config))
    return new


@triton.jit
def _add_source_rows(ptr, row, exists, k, value, size: tl.constexpr):
    column = k + tl.arange(0, value.shape[1])[None, :]
    at = ptr + row[:, None] * size + column
    mask = exists[:, None] & (column < size)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def register_sums(config: tl.constexpr):
    """Gradients of the weights that a program adds up in registers: zeros to begin with.

    Of the first layer [BH, part], of the last [BH, BC] and of its bias [BC]; or nothing.
    """
    sums = ()
    if config.weight_gradients_in_registers:
        N: tl.constexpr = config.mlp.widths[0]
        sums = (
            tl.zeros((N, config.perception.part), tl.float32),
            tl.zeros((N, config.block_c), tl.float32),
            tl.zeros((config.block_c,), tl.float32),
        )
    return sums


@triton.jit
def store_register_sums(sums, grads_ptr, config: tl.constexpr):
    """Adds the sums of :func:`register_sums` to the program's partial sums in memory."""
    if config.weight_gradients_in_registers:
        tl.debug_barrier()  # others have cleared the same sums, or added to them
        add_layer_block(grads_ptr, 0, 0, 0, tl.trans(sums[0]), config)
        add_layer_block(grads_ptr, 1, 0, 0, sums[1], config)
        add_vector(grads_ptr + config.packed.bias_at[1], 0, sums[2])


@triton.jit
def _mlp_backward_in_registers(
    du, parts, sources, row, exists, weights_ptr, grads_ptr, sums, config: tl.constexpr
):
    """:func:`mlp_backward` of two layers without sources, whose hidden units are one block."""
    N: tl.constexpr = config.mlp.widths[0]
    d_first, d_last, d_bias = sums
    z = first_layer(parts, sources, row, exists, weights_ptr, 0, N, config)
    w_last = layer_block(weights_ptr, 1, 0, 0, N, config.block_c, config)
    d_out = rounded(du, config)
    dh = dot(d_out, tl.trans(w_last), tl.zeros((config.rows, N), tl.float32), config)
    dz = activate_backward(z, dh, config.activation, config)
    d_last = dot(tl.trans(hidden(z, config)), d_out, d_last, config)
    d_bias += tl.sum(du, axis=0)
    d_first = dot(tl.trans(dz), parts[0], d_first, config)
    if not config.perception.ones:
        add_vector(grads_ptr + config.packed.bias_at[0], 0, _row_sum(dz, config))
    w_first = part_block(weights_ptr, 0, 0, N, config)
    zeros = tl.zeros((config.rows, config.perception.part), tl.float32)
    d_part = dot_result(dz, tl.trans(w_first), zeros, config)
    return (d_part,), (d_first, d_last, d_bias)


@triton.jit
def mlp_backward(
    du, parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr, d_sources, sums,
    config: tl.constexpr,
):  # fmt: skip
    """From the gradient of the update, du [R, BC], to those of the parts, a tuple of [R, part].

    ``row``: rows of the two sources, and of their gradients, which are per cell. Adds up the
    gradients of the weights, in memory or in ``sums``, see :func:`register_sums`: they are the
    second result.
    """
    if config.weight_gradients_in_registers:
        d_parts, sums = _mlp_backward_in_registers(
            du, parts, sources, row, exists, weights_ptr, grads_ptr, sums, config
        )
    else:
        d_parts = _mlp_backward(
            du, parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr, d_sources, config
        )
    return d_parts, sums


@triton.jit
def _mlp_backward(
    du, parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr, d_sources,
    config: tl.constexpr,
):  # fmt: skip
    BH: tl.constexpr = config.mlp.block_h
    last: tl.constexpr = config.mlp.layers - 1
    d_parts = ()
    for _ in tl.static_range(config.perception.parts):
        d_parts = d_parts + (tl.zeros((config.rows, config.perception.part), tl.float32),)
    if last == 0:
        d_parts = first_layer_backward(
            rounded(du, config), 0, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr,
            d_sources, config,
        )  # fmt: skip
    else:
        store_hidden(parts, sources, row, exists, scratch_ptr, weights_ptr, config)
        if config.wanted.weights:
            add_vector(grads_ptr + config.packed.bias_at[last], 0, tl.sum(du, axis=0))
        for n in range(0, config.mlp.widths[last - 1], BH):
            z = hidden_layer(
                last - 1, parts, sources, row, exists, scratch_ptr, weights_ptr, n, config
            )
            h = hidden(z, config)
            w = layer_block(weights_ptr, last, n, 0, BH, config.block_c, config)
            d_out = rounded(du, config)
            dh = dot(d_out, tl.trans(w), tl.zeros((config.rows, BH), tl.float32), config)
            dz = activate_backward(z, dh, config.activation, config)
            if config.wanted.weights:
                add_layer_block(grads_ptr, last, n, 0, _outer(h, d_out, config), config)
            if last == 1:
                d_parts = first_layer_backward(
                    dz, n, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr,
                    d_sources, config,
                )  # fmt: skip
            else:
                _store_gradient(last - 1, dz, n, scratch_ptr, grads_ptr, config)
        for i in tl.static_range(config.mlp.layers - 2):
            tl.debug_barrier()  # these threads read the gradients that others wrote
            d_parts = _hidden_layer_backward(
                last - 1 - i, parts, d_parts, sources, row, exists, scratch_ptr, weights_ptr,
                grads_ptr, d_sources, config,
            )  # fmt: skip
    return d_parts


@triton.jit
def _store_gradient(layer: tl.constexpr, dz, n, scratch_ptr, grads_ptr, config: tl.constexpr):
    """The gradient before the activation of hidden ``layer`` to scratch, its bias's added."""
    _store_units(scratch_ptr + config.scratch.gradient_at[layer], layer, n, dz, config)
    if config.wanted.weights:
        add_vector(grads_ptr + config.packed.bias_at[layer], n, tl.sum(dz, axis=0))


@triton.jit
def _hidden_layer_backward(
    layer: tl.constexpr, parts, d_parts, sources, row, exists, scratch_ptr, weights_ptr, grads_ptr,
    d_sources, config: tl.constexpr,
):  # fmt: skip
    """From the gradient of hidden ``layer`` > 0, in scratch, to that of the one before it."""
    BH: tl.constexpr = config.mlp.block_h
    for k in range(0, config.mlp.widths[layer - 1], BH):
        z = _load_units(scratch_ptr + config.scratch.hidden_at[layer - 1], layer - 1, k, config)
        h = hidden(z, config)
        dh = tl.zeros((config.rows, BH), tl.float32)
        for n in range(0, config.mlp.widths[layer], BH):
            d = _load_units(scratch_ptr + config.scratch.gradient_at[layer], layer, n, config)
            w = layer_block(weights_ptr, layer, k, n, BH, BH, config)
            dh = dot(d, tl.trans(w), dh, config)
            if config.wanted.weights:
                add_layer_block(grads_ptr, layer, k, n, _outer(h, d, config), config)
        dz = activate_backward(z, dh, config.activation, config)
        if layer == 1:
            d_parts = first_layer_backward(
                dz, k, parts, d_parts, sources, row, exists, weights_ptr, grads_ptr, d_sources,
                config,
            )  # fmt: skip
        else:
            _store_gradient(layer - 1, dz, k, scratch_ptr, grads_ptr, config)
    return d_parts
