"""Turns a forward and a backward kernel into JAX primitives.

An op ``f`` becomes three primitives: ``f_forward`` (its value and what the backward needs),
``f_backward`` (the gradients, given the cotangent of the value) and ``f_tangent``, the linear map
of forward-mode differentiation, which exists to be transposed into ``f_backward`` and never runs.
Differentiation rules of primitives tell the backward which gradients are wanted, which
``jax.custom_vjp`` does not; the kernels compute no others.

Every operand has a leading group axis (see :mod:`nca_kernels.call`). ``jax.vmap``
multiplies the groups; an operand that all groups share may keep a group axis of 1. Which backend
runs is decided at lowering, per platform, by :mod:`nca_kernels.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nca_kernels import dispatch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Call(Protocol):
    """The static facts of one call, hashable: a static parameter of the primitives."""

    op: str
    treedef: Any  # of the operands
    shared: tuple[bool, ...]  # for each operand: whether its group axis may be 1

    def operands(self, arrays: Sequence[Any]) -> Any:
        """The operands, with names, among the arrays that a primitive has."""
        ...

    def outputs(self, avals: Sequence[Any]) -> list[Any]:
        """Abstract outputs of the forward: the value, then what is saved for the backward."""
        ...


def differentiable_op(op: str) -> Callable[..., list[Array]]:
    """Makes the primitives of one op; returns ``bind(call, backend, operands) -> outputs``."""
    forward = _primitive(f"{op}_forward")
    tangent = _primitive(f"{op}_tangent")
    backward = _primitive(f"{op}_backward")

    forward.def_abstract_eval(lambda *avals, call, backend: call.outputs(avals))
    tangent.def_abstract_eval(lambda *avals, call, backend, wrt: call.outputs(avals)[:1])
    backward.def_abstract_eval(_gradient_avals)

    ad.primitive_jvps[forward] = partial(_jvp, forward, tangent)
    ad.primitive_transposes[tangent] = partial(_transpose, backward)
    ad.primitive_jvps[backward] = _no_second_order
    for primitive in (forward, tangent, backward):
        rule = partial(_batch, primitive, has_tangents=primitive is tangent)
        batching.primitive_batchers[primitive] = rule
    for primitive, kind in ((forward, "forward"), (backward, "backward")):
        lower = partial(_lower, kind=kind)
        for platform in PLATFORMS:
            mlir.register_lowering(primitive, partial(lower, platform=platform), platform=platform)
        mlir.register_lowering(primitive, partial(lower, platform="another platform"))
    mlir.register_lowering(tangent, _no_forward_mode)
    tangent.def_impl(_no_forward_mode)

    def bind(call: Call, backend: str, operands: Any) -> list[Array]:
        flat = _match_varying(jax.tree.leaves(operands))
        return forward.bind(*flat, call=call, backend=backend)

    return bind


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f"nca_{name}")
    primitive.multiple_results = True

    def run(*args: Any, **params: Any) -> Any:
        with jax.disable_jit(False):  # kernels exist compiled only, also for people who debug
            return _compiled(primitive, tuple(params.items()))(*args)

    primitive.def_impl(run)
    return primitive


@cache
def _compiled(primitive: Primitive, params: tuple) -> Callable:
    """Compiles eager calls, as those in the eager half of ``jax.vjp``, once per static call."""
    return jax.jit(lambda *args: primitive.bind(*args, **dict(params)))


# ---- differentiation ----


def _jvp(
    forward: Primitive, tangent: Primitive, primals: Any, tangents: Any, *, call: Call, backend: str
) -> tuple[Any, Any]:
    outs = forward.bind(*primals, call=call, backend=backend)
    wrt = tuple(type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents)
    zeros = [ad.Zero(jax.typeof(o).to_tangent_aval()) for o in outs]
    if not any(wrt):
        return outs, zeros
    wanted = [t for t, w in zip(tangents, wrt, strict=True) if w]
    (out,) = tangent.bind(*primals, *outs[1:], *wanted, call=call, backend=backend, wrt=wrt)
    return outs, [out, *zeros[1:]]


def _transpose(
    backward: Primitive,
    cotangents: Any,
    *args: Any,
    call: Call,
    backend: str,
    wrt: tuple[bool, ...],
) -> list[Any]:
    (cotangent,) = cotangents
    num_known = len(args) - sum(wrt)
    if type(cotangent) is ad.Zero:
        return [None] * len(args)
    known, linear = args[:num_known], args[num_known:]
    # Tangents that are known constants need no cotangent.
    asked = [ad.is_undefined_primal(t) for t in linear]
    positions = [i for i, w in enumerate(wrt) if w]
    wrt = tuple(
        i in [p for p, a in zip(positions, asked, strict=True) if a] for i in range(len(wrt))
    )
    grads = iter(backward.bind(*known, cotangent, call=call, backend=backend, wrt=wrt))
    return [None] * num_known + [
        _sum_groups(next(grads), t.aval.shape[0]) if a else None
        for t, a in zip(linear, asked, strict=True)
    ]


def _sum_groups(grad: Array, groups: int) -> Array:
    """The gradient of an operand that all groups share is the sum over the groups."""
    return grad if grad.shape[0] == groups else jnp.sum(grad, axis=0, keepdims=True)


def _gradient_avals(*avals: Any, call: Call, backend: str, wrt: tuple[bool, ...]) -> list[Any]:
    groups = avals[0].shape[0]
    operands = avals[: len(wrt)]
    return [a.update(shape=(groups, *a.shape[1:])) for a, w in zip(operands, wrt, strict=True) if w]


def _no_forward_mode(*args: Any, call: Call, **params: Any) -> Any:
    raise TypeError(
        f"nca_kernels.{call.op} has no forward-mode derivative (jax.jvp, jax.jacfwd, "
        "jax.linearize, jax.hessian): use reverse mode (jax.grad, jax.vjp, jax.jacrev), or "
        "backend='reference', which is plain JAX"
    )


def _no_second_order(primals: Any, tangents: Any, *, call: Call, **params: Any) -> Any:
    raise TypeError(
        f"nca_kernels.{call.op} has first derivatives in reverse mode only, not derivatives of "
        "its gradient: use backend='reference', which is plain JAX"
    )


# ---- vmap ----


def _batch(
    primitive: Primitive,
    args: Any,
    dims: Any,
    *,
    call: Call,
    has_tangents: bool,
    **params: Any,
) -> tuple[list[Any], list[int]]:
    """Merges the mapped axis into the group axis of every operand."""
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    state, dim = args[0], dims[0]
    groups = state.shape[0 if dim is None or dim > 0 else 1]
    tangents = params["wrt"] if has_tangents else ()
    shared = _shareable(call, tangents, len(args))
    merged = [
        _merge_axis(a, d, size, groups, s) for a, d, s in zip(args, dims, shared, strict=True)
    ]
    outs = primitive.bind(*merged, call=call, **params)
    outs = [o.reshape(size, groups, *o.shape[1:]) for o in outs]
    return outs, [0] * len(outs)


def _shareable(call: Call, tangents: tuple[bool, ...], num_args: int) -> list[bool]:
    """For each argument, whether its group axis may be 1.

    The arguments are operands, then what was saved, then a cotangent or tangents. A tangent has the
    group axis of its operand; a cotangent and what was saved belong to a group each.
    """
    shared = list(call.shared)
    last = [s for s, t in zip(shared, tangents, strict=False) if t]
    return shared + [False] * (num_args - len(shared) - len(last)) + last


def _merge_axis(array: Array, dim: int | None, size: int, groups: int, shared: bool) -> Array:
    if dim is None:
        if shared and array.shape[0] == 1:
            return array
        array = jnp.broadcast_to(array[None], (size, *array.shape))
    else:
        array = jnp.moveaxis(array, dim, 0)
    if array.shape[1] != groups:
        array = jnp.broadcast_to(array, (size, groups, *array.shape[2:]))
    return array.reshape(size * groups, *array.shape[2:])


# ---- shard_map ----


def _match_varying(arrays: list[Array]) -> list[Array]:
    """Marks every operand as varying over the mesh axes that any of them varies over."""
    axes = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(a, tuple(sorted(union - v, key=str)), to="varying") if union - v else a
        for a, v in zip(arrays, axes, strict=True)
    ]


# ---- lowering ----


def _lower(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    kind: str,
    platform: str,
    call: Call,
    backend: str,
    wrt: tuple[bool, ...] = (),
) -> Any:
    kernels = dispatch.kernels(call, ctx.avals_in, platform, backend)

    def forward(*flat: Array) -> Any:
        return kernels.forward(call, platform, call.operands(flat))

    def backward(*flat: Array) -> Any:
        num_operands = call.treedef.num_leaves
        *saved, cotangent = flat[num_operands:]
        return kernels.backward(call, platform, call.operands(flat), saved, cotangent, wrt)

    # Inside shard_map a kernel sees only its shard, and is lowered without manual axes.
    avals: list[Any] = list(ctx.avals_in)
    avals = [jax.core.ShapedArray(a.shape, a.dtype) for a in avals]
    fun = forward if kind == "forward" else backward
    return mlir.lower_fun(fun, multiple_results=True)(ctx.replace(avals_in=avals), *args)
