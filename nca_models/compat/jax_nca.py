"""The `NCA` and `EmojiTrainer` of jax-nca with fused steps, and `accelerate` for the original.

    from nca_models.compat.jax_nca import accelerate

    nca = accelerate(nca)  # a jax_nca.nca.NCA; or use this module's NCA in its place

The interface, the parameters (names, shapes, initial values, files) and the trajectories are those
of the original. The package jax-nca (S. Sudhakaran, github.com/shyamsn97/jax-nca) is not needed.
Two things differ:

- `cell_fire_rate` below 1 makes cells fire at that rate, by `rng`. The original updates every cell
  at any rate below 1, and at 1 draws a mask that is all ones.
- `multi_step` and the trainer draw each step's cells from `fold_in(rng, t)`, not from `rng` itself.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import Array

import nca_kernels as nk
from nca_models._files import whole_file
from nca_models.compat.jax_nca_trainer import EmojiTrainer, ImageDataset

__all__ = ["NCA", "EmojiTrainer", "ImageDataset", "accelerate"]

ALPHA = 3  # the alive channel, after red, green and blue
_HIDDEN = 64


def accelerate(nca: Any, backend: str = "auto") -> NCA:
    """Return the fused form of a `jax_nca.nca.NCA`; its parameters fit as they are.

    Args:
        nca: an `NCA` of jax-nca, or of this module.
        backend: name of the `nca_kernels` backend, or "auto".

    Raises:
        TypeError: `nca` is something else, a subclass included: its methods are unknown.
    """
    names = {field.name for field in fields(NCA)} - {"parent", "name", "backend"}
    cls = type(nca)
    if cls is not NCA and (cls.__module__, cls.__name__) != ("jax_nca.nca", "NCA"):
        raise TypeError(
            f"nca must be a jax_nca.nca.NCA, got {cls.__module__}.{cls.__name__}; for a step of "
            "your own, see nca_kernels.testing.check_equivalent"
        )
    if cls is not NCA and nca.cell_fire_rate < 1:
        warnings.warn(
            f"cell_fire_rate is {nca.cell_fire_rate}: jax-nca updates every cell at any rate below "
            "1, this fires at the rate; set it to 1.0 for the trajectory of the original",
            stacklevel=2,
        )
    return NCA(**{name: getattr(nca, name) for name in names}, backend=backend)


class NCA(nn.Module):
    """The NCA of jax-nca: C = 3 + 1 + hidden channels, Sobel perception, two hidden layers of 64.

    Attributes:
        num_hidden_channels: channels beside red, green, blue and alpha.
        num_target_channels: part of the interface; nothing depends on it.
        alpha_living_threshold: a cell lives if the largest alpha around it is above this.
        cell_fire_rate: probability that a cell updates in a step; from 1 on, every cell does.
        trainable_perception: whether each channel has three trained filters, not Sobel filters.
        alpha: multiplies the update.
        backend: name of the `nca_kernels` backend, or "auto".
    """

    num_hidden_channels: int
    num_target_channels: int = 3
    alpha_living_threshold: float = 0.1
    cell_fire_rate: float = 1.0
    trainable_perception: bool = False
    alpha: float = 1.0
    backend: str = "auto"

    @classmethod
    def create_seed(
        cls,
        num_hidden_channels: int,
        num_target_channels: int = 3,
        shape: tuple[int, int] = (48, 48),
        batch_size: int = 1,
    ) -> np.ndarray:
        """Return states with one living cell, `[batch_size, *shape, C]` float32."""
        seed = np.zeros((batch_size, *shape, num_hidden_channels + 4), np.float32)
        seed[:, shape[0] // 2, shape[1] // 2, ALPHA:] = 1.0
        return seed

    @property
    def num_channels(self) -> int:
        """C, the channels of the state."""
        return 3 + self.num_hidden_channels + 1

    def setup(self) -> None:
        """Declare the parameters, under the names of the original."""
        if self.trainable_perception:
            self.perception = _Perception(self.num_channels)
        self.update_net = _UpdateNet(self.num_channels)

    def __call__(self, x: Any, rng: Any) -> Array:
        """Take one step.

        Args:
            x: `[*batch, height, width, C]`.
            rng: key of the step's fire mask; not used if every cell fires.
        """
        params = self._rule_params()
        return nk.step(self.rule, params, jnp.asarray(x), rng, backend=self.backend)

    @property
    def rule(self) -> nk.Rule:
        """What a step computes, as `nca_kernels` takes it."""
        return nk.Rule(
            activation="relu",
            fire_rate=min(self.cell_fire_rate, 1.0),
            step_size=self.alpha,
            alive=nk.Alive(ALPHA, self.alpha_living_threshold),
        )

    def rule_params(self, params: Any) -> nk.RuleParams:
        """Return `params`, of `init(...)["params"]`, as `nca_kernels` takes them."""
        out: Any = self.apply({"params": params}, method="_rule_params")
        return cast(nk.RuleParams, out)

    def _rule_params(self) -> nk.RuleParams:
        (weight, bias), *rest = self.update_net()
        if self.trainable_perception:
            return nk.RuleParams(self.perception(), None, ((weight, bias), *rest))
        # The original's Sobel filters sum over the channels: C times the same two features, whose
        # rows of the first layer can be added up.
        cells, x, y = jnp.split(weight, 3)
        rows = [cells, x.sum(0, keepdims=True), y.sum(0, keepdims=True)]
        taps = jnp.asarray(_sum_sobel(self.num_channels))
        return nk.RuleParams(taps, None, ((jnp.concatenate(rows), bias), *rest))

    def multi_step(
        self, params: Any, current_state: Any, rng: Any, num_steps: int = 2
    ) -> tuple[Array, Array]:
        """Return (last state, states `[num_steps, *state]`); step t fires by `fold_in(rng, t)`."""
        out: tuple[Array, Array] = nk.rollout(
            self.rule,
            self.rule_params(params),
            jnp.asarray(current_state),
            rng,
            num_steps,
            checkpoint="all",
            return_states=True,
            backend=self.backend,
        )
        return out

    def save(self, params: Any, path: str | Path) -> None:
        """Write parameters to a file (msgpack by `flax.serialization`), whole or not at all."""
        with whole_file(Path(path)) as temporary:
            temporary.write_bytes(serialization.to_bytes(params))

    def load(self, path: str | Path) -> Any:
        """Return the parameters in a file that this or the original's `save` wrote.

        Raises:
            ValueError: they are those of another network.
        """
        key = jax.random.key(0)
        seed = self.create_seed(self.num_hidden_channels)
        expected = jax.eval_shape(lambda: self.init(key, seed, key))["params"]
        template = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), expected)
        params = serialization.from_bytes(template, Path(path).read_bytes())
        shapes = [jax.tree.map(np.shape, tree) for tree in (params, template)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path} has parameters {shapes[0]}, but this NCA has {shapes[1]}")
        return jax.tree.map(jnp.asarray, params)

    def to_rgb(self, x: Any) -> Array:
        """Return states `[..., C]` on white, `[..., 3]` in 0 to 1."""
        rgb, alpha = x[..., :3], jnp.clip(x[..., ALPHA : ALPHA + 1], 0.0, 1.0)
        return jnp.clip(1.0 - alpha + rgb, 0.0, 1.0)


def _sum_sobel(channels: int) -> np.ndarray:
    """Dense taps `[3, 3, C, C + 2]`: the cell, and the Sobel filters of the channels' sum."""
    along_y, along_x = np.moveaxis(np.asarray(nk.taps(("sobel",), 1)), -1, 0)  # [3, 3, 1] each
    taps = np.zeros((3, 3, channels, channels + 2), np.float32)
    taps[1, 1, :, :channels] = np.eye(channels)
    taps[..., channels] = along_x
    taps[..., channels + 1] = along_y
    return taps


class _Convolution(nn.Module):
    """The parameters of an `nn.Conv`, with its names and initial values, and no convolution."""

    shape: tuple[int, ...]
    use_bias: bool = True
    zeros: bool = False

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        init = nn.initializers.zeros if self.zeros else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, self.shape)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:])


class _Perception(nn.Module):
    """Trained depthwise taps `[3, 3, 1, 3*C]`."""

    channels: int

    @nn.compact
    def __call__(self) -> Array:
        return _Convolution((3, 3, 1, 3 * self.channels), use_bias=False, name="Conv_0")()[0]


class _UpdateNet(nn.Module):
    """The layers `(W [in, out], b [out] or None)`."""

    channels: int

    @nn.compact
    def __call__(self) -> list[tuple[Array, Array | None]]:
        widths = (3 * self.channels, _HIDDEN, _HIDDEN, self.channels)
        layers = []
        for i in range(3):
            last = i == 2
            conv = _Convolution(
                (1, 1, *widths[i : i + 2]), use_bias=not last, zeros=last, name=f"Conv_{i}"
            )
            kernel, bias = conv()
            layers.append((kernel[0, 0], bias))
        return layers
