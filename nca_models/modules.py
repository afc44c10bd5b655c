"""Flax nnx modules over the public operations of `nca_kernels`."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nca_kernels as nk

_DEFAULT_RULE = nk.Rule()


class Automaton(nnx.Module):
    """The base of all models: a step, and rollouts of it. It holds no random state."""

    tiles: tuple[int, Any, Any] | None = None  # see `NCA.in_tiles`

    def __call__(self, state: jax.Array, key: jax.Array) -> jax.Array:
        """Take one step of a state `[*batch, *spatial, C]`; `key` is the key of the fire mask."""
        raise NotImplementedError

    def cost(self) -> nk.Cost:
        """Return what a step costs at least, per cell, if every cell fires."""
        raise NotImplementedError

    def rollout(
        self,
        state: jax.Array,
        key: jax.Array,
        num_steps: int,
        *,
        sample_steps: jax.Array | None = None,
        checkpoint: str = "all",
    ) -> Any:
        """Take `num_steps` steps; step t uses `jax.random.fold_in(key, t)`.

        Args:
            state: `[*batch, *spatial, C]`.
            key: PRNG key of the whole rollout.
            num_steps: how many steps to take.
            sample_steps: numbers of steps, `[*batch]` int, or None.
            checkpoint: what is kept for the backward. Here it is always "all", which means what
                each step keeps; `nk.step` and `nk.update` keep the state.

        Returns:
            The final state; with `sample_steps`, `(final, sampled)`: each sample's state after
            that many steps.
        """

        def one_step(carry: Any, t: jax.Array) -> tuple[Any, None]:
            state, sampled = carry
            state = self(state, jax.random.fold_in(key, t))
            if sample_steps is not None:
                ones = (1,) * (state.ndim - sample_steps.ndim)
                chosen = (sample_steps == t + 1).reshape(*sample_steps.shape, *ones)
                sampled = jnp.where(chosen, state, sampled)
            return (state, sampled), None

        first = (state, None if sample_steps is None else state)
        (final, sampled), _ = jax.lax.scan(one_step, first, jnp.arange(num_steps))
        return final if sample_steps is None else (final, sampled)


@partial(jax.jit, static_argnums=3)
def _run(split_model: Any, state: jax.Array, key: jax.Array, num_steps: int) -> jax.Array:
    final: jax.Array = nnx.merge(*split_model).rollout(state, key, num_steps)
    return final


def run(
    model: Automaton, state: Any, key: jax.Array, num_steps: int, *, donate: bool = False
) -> Any:
    """Return the state after `num_steps` steps; each number of steps is compiled once.

    A model that runs in tiles returns a NumPy array, with `donate` in the memory of `state`.
    """
    if model.tiles is None:
        return _run(nnx.split(model), state, key, num_steps)
    lattice: Any = np.asarray(state)
    return model.rollout(lattice, key, num_steps, donate=donate)  # type: ignore[call-arg]


class Constant:
    """An array that is part of a module's structure, and so constant in JAX's transformations."""

    def __init__(self, array: np.ndarray):
        """Keep a copy of the array."""
        self.array = array.copy()

    def __eq__(self, other: object) -> bool:
        """Tell whether shapes and values are equal."""
        return isinstance(other, Constant) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        """Return a number that equal arrays share."""
        return hash((self.array.shape, self.array.tobytes()))


class NCA(Automaton):
    """A neural cellular automaton: filter taps, an MLP, and the rule that applies them.

    Hidden layers start from Lecun-normal weights, the last one from zeros (with `zero_init`), so
    that an untrained automaton leaves every living cell as it is. Randomness comes from the keys
    that a call is given: the module holds no random state.
    """

    def __init__(
        self,
        channels: int,
        hidden: Sequence[int] = (128,),
        filters: Sequence[str | np.ndarray] = ("identity", "sobel"),
        num_spatial_dims: int = 2,
        *,
        rule: nk.Rule = _DEFAULT_RULE,
        inputs: int = 0,
        trainable_perception: bool = False,
        zero_init: bool = True,
        last_bias: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        """Build the taps and the layers.

        Args:
            channels: C, the channels of the state.
            hidden: widths of the hidden layers.
            filters: names of filter banks or arrays of taps, as `nca_kernels.taps` takes them.
            num_spatial_dims: 1, 2 or 3.
            rule: what a step computes; see `nca_kernels.Rule`.
            inputs: I, the width of the external inputs; 0 if there are none.
            trainable_perception: whether the taps are an `nnx.Param` or a constant.
            zero_init: whether the last layer starts from zeros.
            last_bias: whether the last layer has a bias.
            backend: name of the `nca_kernels` backend, or "auto".
            rngs: source of the initial weights (stream `params`).
        """
        taps = nk.taps(tuple(filters), channels, num_spatial_dims)
        self.perception = nnx.Param(jnp.asarray(taps)) if trainable_perception else Constant(taps)
        widths = (taps.shape[-1] + inputs, *hidden, channels)
        last_init = nnx.initializers.zeros_init() if zero_init else nnx.initializers.lecun_normal()
        inits = [nnx.initializers.lecun_normal() for _ in hidden] + [last_init]
        biases = [True for _ in hidden] + [last_bias]
        self.layers = nnx.List(
            nnx.Linear(n_in, n_out, kernel_init=init, use_bias=bias, rngs=rngs)
            for n_in, n_out, init, bias in zip(widths[:-1], widths[1:], inits, biases, strict=True)
        )
        self.rule = rule
        self.backend = backend
        self.devices: tuple[Any, Any] | None = None

    def split_over(self, mesh: jax.sharding.Mesh, spec: Callable[[int], Any]) -> None:
        """Split all later rollouts over a mesh; `spec(state.ndim)` is the `PartitionSpec`."""
        self.devices = mesh, spec

    def in_tiles(self, side: int, progress: Callable[[int], Any] | None = None) -> None:
        """Keep lattices in the host's memory in all later rollouts, and run them tile by tile.

        A tile has `side` cells along each axis.
        `progress` is called with the number of cell-steps done; see `nca_kernels.tiled_rollout`.
        """
        self.tiles = side, progress, jax.devices()[0]

    def rule_params(self) -> nk.RuleParams:
        """Return the weights in the form that `nca_kernels` takes."""
        taps = self.perception
        array = taps.array if isinstance(taps, Constant) else taps[...]
        return nk.RuleParams(perception=array, layers=mlp_layers(self.layers))

    def cost(self) -> nk.Cost:
        """See `Automaton.cost`."""
        return nk.cost(self.rule_params())

    def __call__(
        self, state: jax.Array, key: jax.Array, inputs: jax.Array | None = None
    ) -> jax.Array:
        """Take one step.

        Args:
            state: `[*batch, *spatial, C]`, float32 or bfloat16.
            key: PRNG key of this step's fire mask.
            inputs: `[*batch, *spatial, I]` per cell, `[*batch, I]` per sample, or None.

        Returns:
            The next state, of the shape and dtype of `state`.
        """
        return nk.step(self.rule, self.rule_params(), state, key, inputs, backend=self.backend)

    def rollout(
        self,
        state: Any,
        key: jax.Array,
        num_steps: int,
        inputs: jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Take `num_steps` steps; step t uses `jax.random.fold_in(key, t)`.

        `options` are those of `nca_kernels.rollout`: `checkpoint`, `return_states`,
        `sample_steps`, `after_step`. The result is as there.
        """
        options.setdefault("backend", self.backend)
        args = (self.rule, self.rule_params(), state, key, num_steps, inputs)
        if self.tiles is not None:
            side, progress, device = self.tiles
            with jax.default_device(device):
                return nk.tiled_rollout(*args, tile=side, progress=progress, **options)
        if self.devices is not None:
            mesh, spec = self.devices
            return nk.sharded_rollout(*args, mesh=mesh, partition_spec=spec(state.ndim), **options)
        return nk.rollout(*args, **options)


def mlp_layers(modules: Iterable[Any]) -> tuple[tuple[jax.Array, jax.Array | None], ...]:
    """Return `(W [in, out], b [out] or None)` of linear layers or convolutions of kernel size 1."""
    return tuple(
        (
            module.kernel[...].reshape(module.kernel.shape[-2:]),
            None if module.bias is None else module.bias[...],
        )
        for module in modules
    )


def position_embeddings(embed: nnx.Embed, state: jax.Array, num_spatial_dims: int) -> list[Any]:
    """Return the embedding of each axis of a state, `[*batch, *spatial, features]`.

    Cell i of an axis has embedding i; the embeddings are stretched over axes with more cells.
    """
    known, shape = embed.num_embeddings, (*state.shape[:-1], embed.features)
    embeddings = []
    for axis, size in enumerate(state.shape[-1 - num_spatial_dims : -1]):
        along = embed(jnp.arange(size) * known // max(size, known))  # [size, features]
        ones = (1,) * (num_spatial_dims - 1 - axis)
        embeddings.append(jnp.broadcast_to(along.reshape(size, *ones, -1), shape))
    return embeddings
