"""The same steps as others write them, with the parameters of a case: CAX, PyTorch, plain JAX.

Each peer is a function ``(case, mode, steps) -> run`` where ``run()`` computes and waits, and a
function that returns its state after one step with everything firing, to be checked against ours.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nca_kernels.rule import Alive
from nca_kernels.testing import Case


def available() -> dict[str, str | None]:
    """Each peer by name, with None if it is installed, else what to install."""
    missing: dict[str, str | None] = {}
    for name, package in (("cax", "cax"), ("torch", "torch"), ("slices", "jax")):
        try:
            __import__(package)
            missing[name] = None
        except ImportError:
            missing[name] = f"pip install {package}"
    return missing


# ---- CAX ----


def _cax_system(case: Case, fire_rate: float) -> Any:
    from cax.core import ComplexSystem
    from cax.core.perceive import ConvPerceive
    from cax.core.update import NCAUpdate, ResidualUpdate
    from flax import nnx

    params = case.arguments().params
    dims = len(case.grid)

    class System(ComplexSystem):
        def __init__(self, rngs: Any):
            self.perceive = ConvPerceive(
                channel_size=case.channels,
                perception_size=case.perception_size,
                kernel_size=(3,) * dims,
                feature_group_count=case.channels,
                rngs=rngs,
            )
            common = {
                "channel_size": case.channels,
                "perception_size": case.perception_size,
                "hidden_layer_sizes": case.hidden,
                "cell_dropout_rate": 1 - fire_rate,
                "step_size": case.rule.step_size * fire_rate,  # its dropout divides by the rate
                "rngs": rngs,
            }
            if case.rule.alive is None:
                self.update = ResidualUpdate(num_spatial_dims=dims, **common)
            else:
                self.update = NCAUpdate(kernel_size=(3,) * dims, **common)

        def _step(self, state: Any, input: Any = None, *, sow: bool = False) -> Any:
            return self.update(state, self.perceive(state), input)

    system = System(nnx.Rngs(0))
    system.perceive.conv.kernel[...] = params.perception
    for conv, (weight, bias) in zip(system.update.layers, params.layers, strict=True):
        conv.kernel[...] = weight.reshape(conv.kernel.shape)
        conv.bias[...] = bias
    return system


def cax_run(case: Case, mode: str, steps: int) -> Callable[[], Any]:
    from flax import nnx

    system = _cax_system(case, case.rule.fire_rate)
    state = case.arguments().state
    update_only = nnx.All(nnx.Param, nnx.PathContains("update"))

    def loss(system: Any, state: Any) -> Any:
        return jnp.mean(system(state, num_steps=steps) ** 2)

    if mode == "training":
        grad = nnx.grad(loss, argnums=nnx.DiffState(0, update_only))
        compiled = nnx.jit(lambda system, state: grad(system, state))
    else:
        compiled = nnx.jit(lambda system, state: system(state, num_steps=steps))
    return lambda: jax.block_until_ready(compiled(system, state))


def cax_step(case: Case) -> np.ndarray:
    return np.asarray(_cax_system(case, 1.0)(case.arguments().state, num_steps=1))


# ---- plain JAX, as a careful user writes it: shifted slices and one product a layer ----


def _slices_step(case: Case, fire_rate: float) -> Callable[..., Any]:
    dims, alive = len(case.grid), case.rule.alive

    def perceive(state: Any, taps: Any) -> Any:
        padded = jnp.pad(state, [(0, 0), *[(1, 1)] * dims, (0, 0)])
        taps = taps.reshape(3**dims, case.channels, -1)  # [positions, C, F]
        terms = [
            padded[(slice(None), *map(slice, at, [a + n for a, n in zip(at, case.grid)]))][
                ..., None
            ]
            * taps[i]
            for i, at in enumerate(product(range(3), repeat=dims))
        ]
        return sum(terms[1:], terms[0]).reshape(*state.shape[:-1], -1)

    def lives(state: Any) -> Any:
        assert alive is not None
        window = (1, *(3,) * dims)
        plane = state[..., alive.channel]
        return jax.lax.reduce_window(
            plane, -jnp.inf, jax.lax.max, window, (1,) * (dims + 1), "SAME"
        )[..., None] > alive.threshold  # fmt: skip

    def step(layers: Any, taps: Any, state: Any, key: Any) -> Any:
        hidden = perceive(state, taps)
        for i, (weight, bias) in enumerate(layers):
            hidden = (jax.nn.relu(hidden) if i else hidden) @ weight + bias
        fires = jax.random.bernoulli(key, fire_rate, state.shape[:-1])[..., None]
        new = state + case.rule.step_size * hidden * fires
        return new if alive is None else new * (lives(state) & lives(new))

    return step


def slices_run(case: Case, mode: str, steps: int) -> Callable[[], Any]:
    step = _slices_step(case, case.rule.fire_rate)
    params, state, key, _ = case.arguments()

    def loss(layers: Any, taps: Any, state: Any, key: Any) -> Any:
        keys = jax.random.split(key, steps)
        out, _ = jax.lax.scan(lambda s, k: (step(layers, taps, s, k), None), state, keys)
        return jnp.mean(out**2), out

    fun = jax.grad(loss, has_aux=True) if mode == "training" else lambda *args: loss(*args)[1]
    compiled = jax.jit(fun)
    return lambda: jax.block_until_ready(compiled(params.layers, params.perception, state, key))


def slices_step(case: Case) -> np.ndarray:
    params, state, key, _ = case.arguments()
    step = jax.jit(_slices_step(case, 1.0))
    return np.asarray(step(params.layers, params.perception, state, key))


# ---- PyTorch, channels-last ----


def _torch_parts(case: Case) -> tuple[Any, Callable, list[Any]]:
    import torch
    import torch.nn.functional as F

    params, state, _, _ = case.arguments()
    dims = len(case.grid)
    conv = {2: F.conv2d, 3: F.conv3d}[dims]
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[dims]
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array))

    taps = tensor(jnp.moveaxis(params.perception, (-1, -2), (0, 1)))
    layers = [
        (tensor(w.T).reshape(*w.T.shape, *(1,) * dims).requires_grad_(), tensor(b).requires_grad_())
        for w, b in params.layers
    ]
    x = tensor(jnp.moveaxis(state, -1, 1)).contiguous(memory_format=layout)

    def is_alive(x: Any, alive: Alive) -> Any:
        channel = alive.channel % case.channels
        return pool(x[:, channel : channel + 1], 3, 1, 1) > alive.threshold

    def step(x: Any, fire_rate: float) -> Any:
        hidden = conv(x, taps, padding=1, groups=case.channels)
        for i, (weight, bias) in enumerate(layers):
            hidden = conv(hidden, weight, bias)
            if i < len(layers) - 1:
                hidden = torch.relu(hidden)
        fires = (torch.rand(x.shape[0], 1, *x.shape[2:]) < fire_rate).to(x.dtype)
        y = x + case.rule.step_size * hidden * fires
        if case.rule.alive is None:
            return y
        alive = is_alive(x, case.rule.alive) & is_alive(y, case.rule.alive)
        return y * alive.to(y.dtype)

    return x, step, [p for layer in layers for p in layer]


def torch_run(case: Case, mode: str, steps: int) -> Callable[[], Any]:
    import torch

    x, step, parameters = _torch_parts(case)

    def rollout() -> Any:
        y = x
        for _ in range(steps):
            y = step(y, case.rule.fire_rate)
        return y

    def forward() -> Any:
        with torch.no_grad():
            return rollout()

    def training() -> Any:
        return torch.autograd.grad((rollout() ** 2).mean(), parameters)

    return training if mode == "training" else forward


def torch_step(case: Case) -> np.ndarray:
    import torch

    x, step, _ = _torch_parts(case)
    with torch.no_grad():
        return np.moveaxis(step(x, 1.1).numpy(), 1, -1)


RUN = {"cax": cax_run, "torch": torch_run, "slices": slices_run}
STEP = {"cax": cax_step, "torch": torch_step, "slices": slices_step}
