"""CAX as its users write it, with and without the one line: a training step, and the loss curve.

A step samples the pool, takes a batch by `nnx.vmap`, and updates the weights by an optimizer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.measure import interleaved
from benchmarks.peers import with_products
from nca_models.compat import cax as cax_compat

CASE = "cax"  # the file that the rows belong to

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


def test_a_cax_training_step(chosen, record, thorough):
    pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")
    if record.has("dropin", "cax", "training step", "training"):
        pytest.skip("measured before")
    size, num_steps = 72, 8
    runs = {
        "accelerated": _training(cax_compat.accelerate(_growing(), strict=True), size, num_steps),
        "cax_matmul": _training(with_products(_growing()), size, num_steps),
        "cax": _training(_growing(), size, num_steps),
    }
    row = {"suite": "dropin", "case": "cax", "kind": "training step", "mode": "training"}
    work = BATCH * size * size * num_steps
    record.add(
        {
            **row,
            "work": work,
            "best": "accelerated",
            "seconds": interleaved(runs, chosen.rounds, patience=5.0),
        }
    )


def test_the_loss_curve_of_cax(record, thorough):
    pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")
    if record.has("dropin", "cax", "loss curve", "training"):
        pytest.skip("measured before")
    plain = _training(_growing(), 24, 16)
    fast = _training(cax_compat.accelerate(_growing(), strict=True), 24, 16)
    losses = np.array([[plain(), fast()] for _ in range(50)])
    off = float(np.max(np.abs(losses[:, 1] / losses[:, 0] - 1)))
    row = {"suite": "dropin", "case": "cax", "kind": "loss curve", "mode": "training"}
    ends = {"first": losses[0, 0], "last": losses[-1, 0]}
    record.add({**row, "steps": 50, **ends, "largest_error": off})
    assert off < 1e-3
    assert losses[-1, 0] < losses[0, 0]
