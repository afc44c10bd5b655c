"""Self-autoencoding digits: a digit on one face of a lattice reaches the other through one cell.

After CAX (Faldor and Cully, ICLR 2025), example 45. A wall across the middle of a 3-D lattice has a
single open cell, at its centre: the digit has to be written as a code that fits through, step by
step, and read again on the other side.

A state is `[*batch, size, size, depth, C]` float32; the last channel is the ink, and in the
original it says where cells live. Plane 0 is the near face, the last plane the far one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nca_models import render
from nca_models.data.digits import DigitsConfig
from nca_models.learning import LearnsDigits, Samples, dropout_rule, log10_mean
from nca_models.measures import digits as digit_measures
from nca_models.modules import NCA, run
from nca_models.training.config import (
    SampledStepsConfig,
    dropout_rate,
    life_threshold,
    setting,
    target_side,
)


@dataclass(frozen=True, kw_only=True)
class Config(DigitsConfig, SampledStepsConfig):
    """Settings of self-autoencoding digits."""

    examples: ClassVar[tuple[str, ...]] = ("nca train self_autoencoding --out lattice",)

    target_size: int = target_side(lowest=3)
    depth: int = setting(lowest=3, help="planes from face to face; the wall is plane `depth // 2`")
    channels: int = setting(16, lowest=2, help="C; the last channel is ink")
    hidden: int = setting(256, help="width of the hidden layer")
    fire_rate: float = dropout_rate()
    alive_threshold: float | None = life_threshold("ink", "; None: every cell lives")


PRESETS = {
    "paper": Config(
        target_size=28,
        depth=42,
        num_steps=96,
        min_steps=49,
        batch_size=8,
        pool_size=1024,
        num_train_steps=16384,
        learning_rate=1e-3,
        final_learning_rate=5e-4,
        decay_steps=2000,
    ),
    # Every cell lives: where only ink keeps cells alive, a digit without ink at the centre, as most
    # zeros are, has dead cells around the hole of the wall, and cannot pass. There is no pool: it
    # replaces the worst sample of each batch, so a small one would soon be full of easy digits.
    "medium": Config(
        target_size=14,
        depth=9,
        hidden=128,
        alive_threshold=None,
        num_steps=48,
        min_steps=36,
        batch_size=8,
        pool_size=0,
        num_train_steps=7000,
        learning_rate=3e-3,
        final_learning_rate=2e-5,
    ),
    "small": Config(
        target_size=8,
        depth=7,
        hidden=128,
        alive_threshold=None,
        num_steps=36,
        min_steps=24,
        batch_size=8,
        pool_size=0,
        num_train_steps=7000,
        learning_rate=3e-3,
        final_learning_rate=2e-5,
    ),
}


@dataclass(frozen=True)
class Wall:
    """Clears the middle plane except for its hole, and restores the ink of the near face.

    It is called as `nca_kernels.rollout` calls its `after_step`, on lattices of size `grid`.
    """

    grid: tuple[int, ...]

    def __call__(
        self, before: jax.Array, after: jax.Array, coordinates: Sequence[jax.Array]
    ) -> jax.Array:
        """Return the state after a step, `[*batch, *grid, C]` or a part of the grid."""
        y, x, z = (i == n // 2 for i, n in zip(coordinates, self.grid, strict=True))
        after = jnp.where(z & ~(y & x), 0.0, after)
        ink = jnp.arange(after.shape[-1]) == after.shape[-1] - 1
        return jnp.where((coordinates[2] == 0) & ink, before, after)


class Lattice(NCA):
    """An automaton whose every step ends with `Wall`, so that it cannot change wall or face."""

    def __call__(
        self, state: jax.Array, key: jax.Array, inputs: jax.Array | None = None
    ) -> jax.Array:
        """Take one step; see `NCA`."""
        after = super().__call__(state, key, inputs)
        grid = state.shape[-4:-1]
        coordinates = [jnp.arange(n).reshape(-1, *(1,) * (3 - dim)) for dim, n in enumerate(grid)]
        return Wall(grid)(state, after, coordinates)

    def rollout(
        self,
        state: jax.Array,
        key: jax.Array,
        num_steps: int,
        inputs: jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Take `num_steps` steps; see `NCA.rollout`."""
        wall = Wall(state.shape[-4:-1])
        return super().rollout(state, key, num_steps, inputs, after_step=wall, **options)


class SystemClass(LearnsDigits):
    """Self-autoencoding digits, as `nca_models.systems.System` asks."""

    num_spatial_dims = 3

    def model(self, rngs: nnx.Rngs) -> Lattice:
        """Return an untrained automaton; its taps start as identity and Sobel, and are trained."""
        return Lattice(
            self.config.channels,
            (self.config.hidden,),
            num_spatial_dims=3,
            rule=dropout_rule(self.config),
            trainable_perception=True,
            backend=self.config.backend,
            rngs=rngs,
        )

    def fresh(self, key: jax.Array, n: int) -> Samples:
        """Return `n` lattices that are empty except for a digit on the near face."""
        index = jax.random.randint(key, (n,), 0, len(self.train_images))
        return {"state": self.showing(key, self.train_images[index]), "index": index}

    def errors(self, samples: Samples) -> jax.Array:
        """Return each sample's mean squared error `[n]`: every plane is to show the digit."""
        images = self.train_images[samples["index"]][..., None]
        return jnp.mean((samples["state"][..., -1] - images) ** 2, axis=(1, 2, 3))

    def metrics(self, model: Lattice) -> dict[str, float]:
        """Measure the far faces of digits that training never saw: errors, and what they show."""
        steps = self.config.num_steps
        images, labels = self.tested
        key = jax.random.key(self.config.seed + 1)
        final = run(model, self.showing(key, images), key, steps)
        later = run(model, final, jax.random.key(self.config.seed + 2), steps)
        far = final[..., -1, -1]

        def error(guess: jax.Array) -> float:
            return log10_mean((guess - images) ** 2)

        arrived = digit_measures.arrived(*map(np.asarray, (far, images, self.mean)))
        return {
            "the mean digit for every digit": error(self.mean),
            "far face": error(far),
            "far face, twice as many steps": error(later[..., -1, -1]),
            "near faces that a classifier reads, %": self.read(images),
            "far faces that it reads, %": self.read(far),
            "digits that arrive, %": digit_measures.percent(arrived),
            **{
                f"of {digit}s, %": digit_measures.percent(arrived[labels == digit])
                for digit in range(digit_measures.CLASSES)
            },
        }

    def showing(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Return empty lattices with `images` `[n, size, size]` on the near face."""
        shape = (*images.shape, self.config.depth, self.config.channels)
        return jnp.zeros(shape).at[..., 0, -1].set(images)

    def pictures(self, model: Lattice, folder: Path) -> list[Path]:
        """Write near and far faces of unseen digits, and films of planes and of the lattice."""
        steps, scale = self.config.num_steps, max(1, 96 // self.config.target_size)
        images = jnp.asarray(self.data.test_images[:10])
        key = jax.random.key(self.config.seed + 1)
        final = run(model, self.showing(key, images), key, steps)
        paths = [folder / name for name in ("faces.png", "planes.gif", "lattice.gif")]
        self.save_rows(paths[0], images, final[..., -1, -1])
        film = self.film(model, 2 * steps, every=1)
        render.save_gif(paths[1], render.upscale(film, max(1, scale // 2)))
        start = self.showing(key, images[:1])
        _, states = model.rollout(start, key, steps, return_states=True)
        ink = np.concatenate([start, states[1::2, 0]])[..., -1]
        render.save_lattice_gif(paths[2], ink, self.config.depth // 2)
        return paths

    def picture(self, state: jax.Array) -> np.ndarray:
        """Return one lattice, plane beside plane, near to far, as uint8 RGB.

        Above is the ink, below the code: three hidden channels as red, green and blue.
        """
        ink, hidden = np.asarray(state[..., -1]), np.asarray(state[..., :-1])
        colours = hidden[..., [channel % hidden.shape[-1] for channel in range(3)]]
        code = np.round(127.5 * (1 + np.tanh(colours))).astype(np.uint8)
        planes = range(ink.shape[-1])
        return render.above(
            [
                render.beside([render.grey(ink[..., z]) for z in planes], gap=1),
                render.beside([code[..., z, :] for z in planes], gap=1),
            ],
            gap=1,
        )
