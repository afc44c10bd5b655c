"""Checks ``check(backend, case)`` of a backend's ``neighborhood_attention``.

As in :mod:`nca_kernels.testing.conformance`, the oracle is the backend ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.testing.cases import AttentionCase
from nca_kernels.testing.compare import assert_close, assert_same_bits, tolerance
from nca_kernels.testing.conformance import ORACLE, cotangent_of, each


def attention(backend: str, case: AttentionCase) -> Callable[[Array, Array, Array], Array]:
    """The op of a case, as a function of ``(q, k, v)``."""
    return partial(
        nk.neighborhood_attention,
        radius=case.radius,
        num_spatial_dims=len(case.grid),
        backend=backend,
        padding=case.padding,
    )


def loss(backend: str, case: AttentionCase) -> Callable[[Array, Array, Array], Array]:
    """A weighted sum of the output, in float32."""

    def weighted(q: Array, k: Array, v: Array) -> Array:
        out = attention(backend, case)(q, k, v)
        return jnp.sum(cotangent_of(out).astype("float32") * out.astype("float32"))

    return weighted


def value_and_gradients(backend: str, case: AttentionCase, calls: int = 2) -> dict[str, Any]:
    """The output and the gradients of q, k and v: the same bits in every call."""

    @jax.jit
    def run(*arrays: Array) -> dict[str, Any]:
        out, pull = jax.vjp(attention(backend, case), *arrays)
        return {"out": out, **dict(zip("qkv", pull(cotangent_of(out)), strict=True))}

    arrays = case.arguments()
    first = run(*arrays)
    for _ in range(calls - 1):
        assert_same_bits(run(*arrays), first, "another call")
    return first


@cache
def _expected(case: AttentionCase) -> dict[str, Any]:
    return value_and_gradients(ORACLE, case, calls=1)


def check_values_and_gradients(backend: str, case: AttentionCase) -> None:
    got, expected = value_and_gradients(backend, case), _expected(case)
    assert_close(got, expected, tolerance(case.dtype), "output and gradients ")


def check_wanted_gradients_only(backend: str, case: AttentionCase) -> None:
    """The gradient of each argument alone is the same as together with the others."""
    arrays, expected = case.arguments(), _expected(case)
    for i, name in enumerate("qkv"):
        grad = jax.jit(jax.grad(loss(backend, case), i))(*arrays)
        assert_close(grad, expected[name], tolerance(case.dtype), f"gradient of {name} alone ")


def check_logits_far_from_zero(
    backend: str, case: AttentionCase, shift: float, limit: float = 1e-2
) -> None:
    """Neither exp(logit) nor, at the edge, exp(0 - lse) may overflow, not even times 0.

    Args:
        shift: added to all keys; logits get large, and of its sign.
        limit: the largest error ratio. A logit near 900 is rounded by 3e-5, and gradients add up
            what almost cancels.
    """
    q, k, v = case.arguments()

    def both(backend: str) -> Any:
        out, pull = jax.vjp(attention(backend, case), q + 20, k + shift, v)
        return out, pull(v)

    assert_close(both(backend), both(ORACLE), limit, "output and gradients ")


def check_nan_spreads(backend: str, case: AttentionCase, position: int) -> None:
    """As in plain JAX: to what attends to it, and to the gradients of all that is attended to.

    Args:
        position: of the array that has a NaN in its first sample: 0 for q, 1 for k, 2 for v.
    """
    arrays = list(case.arguments())
    last_cell = tuple(size - 1 for size in case.grid)
    arrays[position] = arrays[position].at[(0, *last_cell, 0, 0)].set(jnp.nan)

    def nans(backend: str) -> list[Array]:
        out, pull = jax.vjp(attention(backend, case), *arrays)
        return [jnp.isnan(a) for a in (out, *pull(jnp.ones_like(out)))]

    np.testing.assert_array_equal(nans(backend), nans(ORACLE))


def _samples(case: AttentionCase, count: int = 3) -> tuple[Array, Array, Array]:
    """(q, k, v) of several samples, each with a leading axis of ``count``."""
    many = zip(*(case.arguments(seed) for seed in range(count)), strict=True)
    q, k, v = (jnp.stack(arrays) for arrays in many)
    return q, k, v


def check_vmap(backend: str, case: AttentionCase) -> None:
    """Over all three, over queries that share keys and values, and nested."""
    got, want, limit = attention(backend, case), attention(ORACLE, case), tolerance(case.dtype)
    q, k, v = _samples(case)
    out = jax.jit(jax.vmap(got))(q, k, v)
    assert_close(out, each(want, q, k, v), limit, "everything ")
    queries = each(lambda q: want(q, k[0], v[0]), q)
    out = jax.jit(jax.vmap(got, (0, None, None)))(q, k[0], v[0])
    assert_close(out, queries, limit, "queries ")
    nested = jax.vmap(jax.vmap(got, (0, None, None)), (None, 0, 0), out_axes=1)
    expected = each(lambda k, v: each(lambda q: want(q, k, v), q), k, v)
    out = jnp.swapaxes(jax.jit(nested)(q, k, v), 0, 1)
    assert_close(out, expected, limit, "nested ")


def check_gradients_under_vmap(backend: str, case: AttentionCase) -> None:
    """vmap(grad) and grad(vmap), with shared and with separate keys and values."""
    got, want = (jax.grad(loss(b, case), (0, 1, 2)) for b in (backend, ORACLE))
    want, limit = jax.jit(want), tolerance(case.dtype)
    q, k, v = _samples(case)
    out = jax.jit(jax.vmap(got))(q, k, v)
    assert_close(out, each(want, q, k, v), limit, "vmap(grad) ")

    def total(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(jax.vmap(loss(backend, case), (0, None, None))(q, k, v))

    out = jax.jit(jax.grad(total, (0, 1, 2)))(q, k[0], v[0])
    d_q, d_k, d_v = each(lambda q: want(q, k[0], v[0]), q)
    assert_close(out, (d_q, d_k.sum(0), d_v.sum(0)), limit, "grad(vmap) ")


def check_scan(backend: str, case: AttentionCase) -> None:
    """A ``lax.scan`` of checkpointed attention of a state to itself, against a loop."""
    state, _, _ = case.arguments()

    def turn(backend: str, state: Array) -> Array:
        # The mean keeps the logits small: sums would amplify rounding from turn to turn.
        return 0.5 * (state + attention(backend, case)(state, state, state))

    def scanned(state: Array) -> Array:
        body = jax.checkpoint(lambda s, _: (turn(backend, s), None))
        return jnp.sum(jnp.sin(jax.lax.scan(body, state, None, length=3)[0].astype("float32")))

    def looped(state: Array) -> Array:
        for _ in range(3):
            state = turn(ORACLE, state)
        return jnp.sum(jnp.sin(state.astype("float32")))

    got, want = (jax.jit(jax.value_and_grad(fun))(state) for fun in (scanned, looped))
    assert_close(got, want, 3 * tolerance(case.dtype), "scan ")  # errors add up over the turns


def check_strict_promotion(backend: str, case: AttentionCase) -> None:
    """No implicit rank or dtype promotion anywhere."""
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out, pull = jax.vjp(attention(backend, case), *case.arguments())
        pull(out)


def check_kernel_ran(backend: str, case: AttentionCase) -> None:
    """The lowered module shows the backend's own kernels, forward and backward."""
    text = jax.jit(jax.grad(loss(backend, case))).lower(*case.arguments()).as_text()
    for marker in dispatch.markers(backend, "neighborhood_attention"):
        assert marker in text, f"{backend} did not run: no {marker!r} in the lowered module"


def check_shard_map(backend: str, case: AttentionCase) -> None:
    """Samples split over devices: values and gradients as on one."""
    devices = jax.devices()[:2]
    assert len(devices) == 2, "needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count"
    arrays = _samples(case, 4)
    mesh, rows = Mesh(np.array(devices), ("data",)), PartitionSpec("data")
    alone = attention(backend, case)
    sharded = jax.shard_map(alone, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)

    def both(fun: Callable) -> Any:
        def total(*arrays: Array) -> tuple[Array, Array]:
            out = fun(*arrays)
            return jnp.sum(jnp.sin(out.astype("float32"))), out

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arrays)

    assert_close(both(sharded), both(alone), tolerance(case.dtype), "sharded gradients, values ")


def check_export(backend: str, case: AttentionCase) -> None:
    """``jax.export`` round trip of the op and its gradients."""
    run, arrays = jax.jit(jax.value_and_grad(loss(backend, case), (0, 1, 2))), case.arguments()
    exported = jax.export.export(run, disabled_checks=nk.DISABLE_JAX_EXPORT_CHECKS)(*arrays)
    again = jax.export.deserialize(exported.serialize())
    assert_same_bits(again.call(*arrays), run(*arrays), "exported")


ATTENTION_CHECKS: dict[str, Callable[[str, AttentionCase], None]] = {
    "values_and_gradients": check_values_and_gradients,
    "wanted_gradients_only": check_wanted_gradients_only,
    "vmap": check_vmap,
    "gradients_under_vmap": check_gradients_under_vmap,
    "scan": check_scan,
    "strict_promotion": check_strict_promotion,
    "kernel_ran": check_kernel_ran,
    "shard_map": check_shard_map,
    "export": check_export,
}
