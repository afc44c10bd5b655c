"""NCAs as their users write them, with and without the one line, in interleaved rounds.

A CAX training step (pool, batch by `nnx.vmap`, optimizer) and the loss curve of 50 of them; the
gradient of jax-nca's `multi_step`. Run with ``make bench``.
"""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.measure import interleaved, median_ratio
from nca_models.compat import cax as cax_compat
from nca_models.compat import jax_nca as jax_nca_compat

CHANNELS, BATCH = 16, 8


def _growing():
    """Growing NCA as CAX's example 40 builds it."""
    from cax.core import ComplexSystem
    from cax.core.perceive import ConvPerceive
    from cax.core.update import NCAUpdate

    import nca_kernels as nk

    class Growing(ComplexSystem):
        def __init__(self, rngs):
            self.perceive = ConvPerceive(
                channel_size=CHANNELS,
                perception_size=3 * CHANNELS,
                feature_group_count=CHANNELS,
                rngs=rngs,
            )
            self.perceive.conv.kernel[...] = jnp.asarray(nk.taps(("identity", "sobel"), CHANNELS))
            self.update = NCAUpdate(
                channel_size=CHANNELS,
                perception_size=3 * CHANNELS,
                hidden_layer_sizes=(128,),
                cell_dropout_rate=0.5,
                zeros_init=True,
                rngs=rngs,
            )

        def _step(self, state, input=None, *, sow=False):
            return self.update(state, self.perceive(state), input)

    return Growing(nnx.Rngs(0))


def _training(cs, size, num_steps):
    """``train_step() -> loss``: each call samples the pool, trains, and updates the pool."""
    from cax.nn.pool import Pool

    target = jnp.asarray(np.random.default_rng(0).random((size, size, 4)), jnp.float32)
    states = 0.5 * jax.random.normal(jax.random.key(1), (4 * BATCH, size, size, CHANNELS))
    pool = Pool.create({"state": states})
    wrt = nnx.All(nnx.Param, nnx.PathContains("update"))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    optimizer = nnx.Optimizer(cs, adam, wrt=wrt)

    def loss_fn(cs, state):
        axes: Any = nnx.StateAxes({nnx.RngState: 0, ...: None})  # type: ignore[arg-type]
        run = nnx.vmap(lambda cs, state: cs(state, num_steps=num_steps), in_axes=(axes, 0))
        state = nnx.split_rngs(splits=BATCH)(run)(cs, state)
        return jnp.mean(jnp.square(state[..., -4:] - target)), state

    @nnx.jit
    def train_step(cs, optimizer, pool, key):
        indices, batch = pool.sample(key, batch_size=BATCH)
        gradient = nnx.value_and_grad(loss_fn, has_aux=True, argnums=nnx.DiffState(0, wrt))
        (loss, state), grads = gradient(cs, batch["state"])
        optimizer.update(cs, grads)
        return loss, pool.update(indices, {"state": state})

    keys = iter(jax.random.split(jax.random.key(2), 1000))

    def run():
        nonlocal pool
        loss, pool = train_step(cs, optimizer, pool, next(keys))
        return float(loss)

    return run


def test_a_cax_training_step(benchmark, record, request):
    pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")
    size, num_steps = 72, 8
    runs = {
        "cax": _training(_growing(), size, num_steps),
        "accelerated": _training(cax_compat.accelerate(_growing(), strict=True), size, num_steps),
    }
    times = interleaved(runs, request.config.getoption("--rounds"))
    benchmark.pedantic(runs["accelerated"], rounds=3, iterations=1)
    cells = BATCH * size * size * num_steps
    row = {f"{name}_ns": 1e9 * statistics.median(t) / cells for name, t in times.items()}
    ratio = median_ratio(times["cax"], times["accelerated"])
    record(name="cax training step", times_faster=ratio, **row, seconds=times)


def test_the_loss_curve_of_cax(benchmark, record):
    pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")
    plain = _training(_growing(), 24, 16)
    fast = _training(cax_compat.accelerate(_growing(), strict=True), 24, 16)
    losses = np.array([[plain(), fast()] for _ in range(50)])
    benchmark.pedantic(fast, rounds=3, iterations=1)
    off = float(np.max(np.abs(losses[:, 1] / losses[:, 0] - 1)))
    record(
        name="cax loss curve", steps=50, first=losses[0, 0], last=losses[-1, 0], largest_error=off
    )
    assert off < 1e-3
    assert losses[-1, 0] < losses[0, 0]


def test_the_gradient_of_jax_nca(benchmark, record, request):
    jax_nca = pytest.importorskip("jax_nca.nca", reason="pip install --no-deps jax-nca")
    theirs = jax_nca.NCA(num_hidden_channels=16)
    ours = jax_nca_compat.accelerate(theirs)
    num_steps, key = 8, jax.random.key(0)
    state = 0.5 * jax.random.normal(key, (BATCH, 64, 64, 20))
    params = theirs.init(key, state, key)["params"]

    def gradient(nca):
        def loss(params):
            return jnp.mean(nca.multi_step(params, state, key, num_steps)[0] ** 2)

        compiled = jax.jit(jax.grad(loss))
        return lambda: jax.block_until_ready(compiled(params))

    runs = {"jax_nca": gradient(theirs), "accelerated": gradient(ours)}
    times = interleaved(runs, request.config.getoption("--rounds"))
    benchmark.pedantic(runs["accelerated"], rounds=3, iterations=1)
    cells = BATCH * 64 * 64 * num_steps
    row = {f"{name}_ns": 1e9 * statistics.median(t) / cells for name, t in times.items()}
    ratio = median_ratio(times["jax_nca"], times["accelerated"])
    record(name="jax-nca gradient", times_faster=ratio, **row, seconds=times)
