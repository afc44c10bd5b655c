"""Systems as users of CAX write them, at small size: those of its examples 40 to 47.

Each class takes `rngs` and has `grid`, `channels` and `inputs` (the number of input channels of its
steps). They compute what the examples compute. Weights that are zero at first in the examples are
random here, so that a step does something.
"""

import inspect

import jax
import jax.numpy as jnp
from cax.core import ComplexSystem
from cax.core.perceive import ConvPerceive, Perceive, grad_kernel, identity_kernel
from cax.core.update import NCAUpdate, ResidualUpdate
from flax import nnx

OLD_API = "sow" in inspect.signature(ComplexSystem.__call__).parameters
"""CAX 0.3.x: trajectories by `sow`; 0.4.x: by `return_states`."""


def filters(dims, channels, names=(identity_kernel, grad_kernel)):
    """The taps that every example starts from, `[*kernel, 1, F*C]`."""
    argument = "ndim" if OLD_API else "num_dims"
    kernel = jnp.concatenate([make(**{argument: dims}) for make in names], axis=-1)
    return jnp.expand_dims(jnp.concatenate([kernel] * channels, axis=-1), axis=-2)


def make_perceive(dims, channels, rngs):
    perceive = ConvPerceive(
        channel_size=channels,
        perception_size=(dims + 1) * channels,
        kernel_size=(3,) * dims,
        feature_group_count=channels,
        rngs=rngs,
    )
    perceive.conv.kernel[...] = filters(dims, channels)
    return perceive


class System(ComplexSystem):
    """What all systems have in common; by itself a system as well, with the usual `_step`."""

    grid, channels, inputs, dropout = (12, 10), 8, 0, 0.5
    make_update = NCAUpdate

    def __init__(self, *, rngs):
        dims = len(self.grid)
        self.perceive = make_perceive(dims, self.channels, rngs)
        self.update = self.new_update(self.perceive.conv.out_features, rngs)

    def new_update(self, perception_size, rngs):
        size = {} if self.make_update is not NCAUpdate else {"kernel_size": (3,) * len(self.grid)}
        if not size:
            size = {"num_spatial_dims": len(self.grid)}
        update = type(self).make_update(
            channel_size=self.channels,
            perception_size=perception_size + self.inputs,
            hidden_layer_sizes=(16,),
            cell_dropout_rate=self.dropout,
            rngs=rngs,
            **size,
        )
        update.layers[-1].kernel[...] *= 0.3  # so that 32 steps stay of order one
        return update

    def _step(self, state, input=None, *, sow=False):
        perception = self.perceive(state)
        return self.done(self.update(state, perception, input), sow)

    def done(self, state, sow):
        if sow:
            self.sow(nnx.Intermediate, "state", state)
        return state


class Growing(System):
    """Example 40."""


class Conditional(System):
    """Example 41: a vector for each sample, the same for each cell."""

    inputs = 3

    def _step(self, state, input=None, *, sow=False):
        input = jnp.broadcast_to(input[..., None, None, :], (*state.shape[:-1], input.shape[-1]))
        return self.done(self.update(state, self.perceive(state), input), sow)


class Unsupervised(Conditional):
    """Example 42: the vector is what an encoder makes of a picture, and trained with the rest."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.encoder = nnx.Linear(5, self.inputs, rngs=rngs)

    def _step(self, state, input=None, *, sow=False):
        return super()._step(state, jnp.tanh(self.encoder(jnp.ones(5))) + input, sow=sow)


class Diffusing(System):
    """Example 43."""

    channels = 20


class SelfClassifying(System):
    """Example 44: dense taps with a bias and relu, and a channel that is put back."""

    def __init__(self, *, rngs):
        self.perceive = ConvPerceive(
            channel_size=self.channels,
            perception_size=13,
            use_bias=True,
            activation_fn=nnx.relu,
            rngs=rngs,
        )
        self.perceive.conv.bias[...] = 0.1 * jax.random.normal(rngs.params(), (13,))
        self.update = self.new_update(13, rngs)

    def _step(self, state, input=None, *, sow=False):
        digit = state[..., -1:]
        state = self.update(state, self.perceive(state), input)
        return self.done(state.at[..., -1:].set(digit), sow)


class SelfAutoencoding(System):
    """Example 45: 3-D, a wall with a hole in the middle, a face that is put back."""

    grid = (5, 4, 6)

    def _step(self, state, input=None, *, sow=False):
        face = state[..., 0, -1:]
        state = self.update(state, self.perceive(state), input)
        y, x, z = (size // 2 for size in self.grid)
        hole = state[..., y, x, z, :]
        state = state.at[..., z, :].set(0.0).at[..., y, x, z, :].set(hole)
        return self.done(state.at[..., 0, -1:].set(face), sow)


class OneDimensional(System):
    """Example 46: a line, every cell fires, no alive mask."""

    grid, channels, dropout = (23,), 12, 0.0
    make_update = ResidualUpdate


class DensePerceive(Perceive):
    """Example 47: attention to the Moore neighbourhood, as a mask of all cells against all."""

    def __init__(self, channels, perception_size, *, heads, hidden, proj, positions, rngs):
        self.linear = nnx.Linear(channels, proj, rngs=rngs)
        self.position_embed = nnx.Embed(positions, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=proj + 8,
            qkv_features=hidden,
            out_features=perception_size,
            decode=False,
            rngs=rngs,
        )

    def __call__(self, state):
        h, w = state.shape[-3:-1]
        rows = jnp.broadcast_to(self.position_embed(jnp.arange(h))[:, None], (h, w, 4))
        columns = jnp.broadcast_to(self.position_embed(jnp.arange(w))[None], (h, w, 4))
        tokens = jnp.concatenate([self.linear(state), rows, columns], axis=-1)
        y, x = jnp.divmod(jnp.arange(h * w), w)
        near = (jnp.abs(y[:, None] - y) <= 1) & (jnp.abs(x[:, None] - x) <= 1)
        out = self.attention(tokens.reshape(h * w, -1), mask=near)
        return out.reshape(h, w, -1)


class Attention(System):
    """Example 47."""

    make_update = ResidualUpdate
    make_perceive = DensePerceive
    grid = (7, 6)

    def __init__(self, *, rngs):
        sizes = {"num_heads": 2, "hidden_size": 8, "proj_size": 6, "max_position_size": 7}
        if self.make_perceive is DensePerceive:
            sizes = dict(zip(("heads", "hidden", "proj", "positions"), sizes.values(), strict=True))
        self.perceive = type(self).make_perceive(self.channels, 10, rngs=rngs, **sizes)
        self.update = self.new_update(10, rngs)


EXAMPLES = (
    Growing,
    Conditional,
    Unsupervised,
    Diffusing,
    SelfClassifying,
    SelfAutoencoding,
    OneDimensional,
    Attention,
)


def arguments(system, batch=None, seed=0):
    """(state, input) of a system: `[*batch, *grid, C]`, `[*batch, I]` or None."""
    keys = jax.random.split(jax.random.key(seed))
    lead = () if batch is None else (batch,)
    state = 0.5 * jax.random.normal(keys[0], (*lead, *system.grid, system.channels))
    # Part of the grid is dead, so that the alive mask matters.
    state = state * (jnp.arange(system.grid[0]) < system.grid[0] * 0.7).reshape(
        -1, *(1,) * len(system.grid)
    )
    input = jax.random.normal(keys[1], (*lead, system.inputs)) if system.inputs else None
    return state, input


def trajectory(cs, state, input, num_steps):
    """(final state, states `[num_steps, *grid, C]`) as each version of CAX gives them."""
    if not OLD_API:
        return cs(state, input, num_steps=num_steps, return_states=True)
    final = cs(state, input, num_steps=num_steps, sow=True)
    return final, nnx.pop(cs, nnx.Intermediate)["state"].get_value()[0]
