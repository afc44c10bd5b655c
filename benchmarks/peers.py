"""The same steps as others write them, with the parameters of a case: CAX, jax-nca, PyTorch, JAX.

A peer has ``run(case, mode, steps)``, which returns a call that computes and waits, and ``step``:
one step in which every cell fires, which is compared with ours before anything is timed. It says
which cases it is written for, and how to install what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nca_kernels as nk
from benchmarks.cases import JaxNcaCase
from nca_kernels.rule import Alive
from nca_kernels.testing import Case, error_ratio


class Peer(NamedTuple):
    """Another implementation of a step; see the docstring of this file.

    Attributes:
        title: what reports call it.
        module, install: what it is imported as, and how to get it.
        run, step: functions of a case; see the docstring of this file.
        fits: whether it is written for such a case at all.
    """

    title: str
    module: str
    install: str
    run: Callable[[Case, str, int], Callable[[], Any]]
    step: Callable[[Case], np.ndarray]
    fits: Callable[[Case], bool]

    @property
    def missing(self) -> str | None:
        """How to install what it needs, or None if that is here."""
        return None if find_spec(self.module) else f"not installed: {self.install}"


def check(peer: Peer, case: Case) -> str | None:
    """Why a peer's step is not the step that we compute, or None."""
    rule = nk.Rule(**{**vars(case.rule), "fire_rate": 1.0, "precision": "float32"})
    params, state, key, _ = case.arguments()
    ours = nk.step(rule, params, state, key)
    error = error_ratio(np.asarray(peer.step(case), np.float32), ours)
    return None if error < 1e-5 else f"its step differs from ours: error ratio {error:.1e}"


def _plain(case: Case) -> bool:
    """Depthwise 3-cell taps, zeros around the grid, no inputs."""
    return (
        case.dense is None
        and not case.kernel
        and not case.inputs
        and (case.rule.padding == "zeros")
    )


# ---- CAX ----


def _cax_system(case: Case, fire_rate: float, products: bool) -> Any:
    """``products``: whether its 1x1 convolutions are written as matrix products."""
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
    return with_products(system) if products else system


def with_products(system: Any) -> Any:
    """The CAX system with matrix products for the 1x1 convolutions of its update, in place.

    XLA's gradient of such a convolution is most of the time of a training step on a CPU.
    """
    from flax import nnx

    class Product(nnx.Module):
        def __init__(self, conv: Any):
            self.kernel, self.bias = conv.kernel, conv.bias

        def __call__(self, x: Any) -> Any:
            kernel = self.kernel[...]
            return x @ kernel.reshape(kernel.shape[-2:]) + self.bias[...]

    system.update.layers = nnx.List(map(Product, system.update.layers))
    return system


def cax_run(case: Case, mode: str, steps: int, products: bool = False) -> Callable[[], Any]:
    from flax import nnx

    system = _cax_system(case, case.rule.fire_rate, products)
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


def cax_step(case: Case, products: bool = False) -> np.ndarray:
    return np.asarray(_cax_system(case, 1.0, products)(case.arguments().state, num_steps=1))


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
    taps = params.perception  # closed over, as ours
    compiled = jax.jit(lambda layers, state, key: fun(layers, taps, state, key))
    return lambda: jax.block_until_ready(compiled(params.layers, state, key))


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
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array)).to(device)

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
        fires = (torch.rand(x.shape[0], 1, *x.shape[2:], device=device) < fire_rate).to(x.dtype)
        y = x + case.rule.step_size * hidden * fires
        if case.rule.alive is None:
            return y
        alive = is_alive(x, case.rule.alive) & is_alive(y, case.rule.alive)
        return y * alive.to(y.dtype)

    return x, step, [p for layer in layers for p in layer]


def torch_run(case: Case, mode: str, steps: int, compiled: bool = False) -> Callable[[], Any]:
    import torch

    x, step, parameters = _torch_parts(case)
    if compiled:
        step = torch.compile(step)

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

    def run() -> Any:
        out = training() if mode == "training" else forward()
        if x.is_cuda:
            torch.cuda.synchronize()
        return out

    return run


def torch_step(case: Case) -> np.ndarray:
    import torch

    x, step, _ = _torch_parts(case)
    with torch.no_grad():
        return np.moveaxis(step(x, 1.1).cpu().numpy(), 1, -1)


def torch_compiled_run(case: Case, mode: str, steps: int) -> Callable[[], Any]:
    return torch_run(case, mode, steps, compiled=True)


# ---- jax-nca ----


def jax_nca_run(case: Case, mode: str, steps: int) -> Callable[[], Any]:
    assert isinstance(case, JaxNcaCase)
    nca, params = _jax_nca(case), case.flax_params()
    state, key = case.arguments().state, jax.random.key(0)

    def last(params: Any) -> Any:
        return nca.multi_step(params, state, key, steps)[0]

    fun = jax.grad(lambda params: jnp.mean(last(params) ** 2)) if mode == "training" else last
    compiled = jax.jit(fun)
    return lambda: jax.block_until_ready(compiled(params))


def jax_nca_step(case: Case) -> np.ndarray:
    assert isinstance(case, JaxNcaCase)
    state = case.arguments().state
    return np.asarray(_jax_nca(case).multi_step(case.flax_params(), state, jax.random.key(0), 1)[0])


def _jax_nca(case: JaxNcaCase) -> Any:
    from jax_nca.nca import NCA

    return NCA(num_hidden_channels=case.channels - 4)


PEERS = {
    "slices": Peer("JAX, slices", "jax", "", slices_run, slices_step, _plain),
    "cax": Peer("CAX", "cax", "pip install cax", cax_run, cax_step, _plain),
    "cax_matmul": Peer(
        "CAX, 1x1 as matmul",
        "cax",
        "pip install cax",
        partial(cax_run, products=True),
        partial(cax_step, products=True),
        _plain,
    ),
    "jax_nca": Peer(
        "jax-nca",
        "jax_nca",
        "pip install --no-deps jax-nca",
        jax_nca_run,
        jax_nca_step,
        lambda case: isinstance(case, JaxNcaCase),
    ),
    "torch": Peer("PyTorch", "torch", "pip install torch", torch_run, torch_step, _plain),
    "torch_compiled": Peer(
        "PyTorch, compiled",
        "torch",
        "pip install torch",
        torch_compiled_run,
        torch_step,
        _plain,
    ),
}
