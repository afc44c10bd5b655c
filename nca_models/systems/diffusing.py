"""Diffusing NCA: a picture appears out of noise, and comes back when it is damaged.

After CAX (Faldor and Cully, ICLR 2025), example 43. It is trained to remove noise, never to regrow.

A state is `[*batch, size, size, C]` float32; its last four channels are premultiplied RGBA, and
alpha, the last, says where cells live. It starts as a blend of the picture and noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from nca_models.data.pictures import PictureConfig
from nca_models.learning import LearnsPicture, Samples
from nca_models.modules import NCA, run
from nca_models.training.config import dropout_rate, life_threshold, setting
from nca_models.training.damage import DAMAGES


@dataclass(frozen=True, kw_only=True)
class Config(PictureConfig):
    """Settings of Diffusing NCA."""

    examples: ClassVar[tuple[str, ...]] = (
        "nca train diffusing --target cat.png --out cat-from-noise",
    )

    channels: int = setting(64, lowest=4, help="C; the last four channels are RGBA")
    hidden: int = setting(256, help="width of the hidden layer")
    num_steps: int = setting(
        help="steps of the automaton in a training step; the loss is at the last one"
    )
    fire_rate: float = dropout_rate()
    alive_threshold: float = life_threshold("alpha")


PRESETS = {
    "paper": Config(
        target_size=40,
        padding=16,
        num_steps=64,
        batch_size=8,
        pool_size=0,
        num_train_steps=8192,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        decay_steps=2000,
    ),
    "small": Config(
        target_size=20,
        padding=4,
        channels=24,
        hidden=128,
        num_steps=48,
        batch_size=4,
        pool_size=0,
        num_train_steps=5000,
        learning_rate=2e-3,
        final_learning_rate=1e-4,
        decay_steps=5000,
    ),
}


class SystemClass(LearnsPicture):
    """Diffusing NCA, as `nca_models.systems.System` asks."""

    def fresh(self, key: jax.Array, n: int) -> Samples:
        """Return `n` blends of picture and noise; the share of noise is uniform in 0 to 1."""
        key_share, key_noise = jax.random.split(key)
        return self._blend(key_noise, jax.random.uniform(key_share, (n, 1, 1, 1)))

    def metrics(self, model: NCA) -> dict[str, float]:
        """Measure denoising and regrowth as log10 of the mean squared error.

        Eight samples are measured, with random numbers that training never used.
        """
        steps = self.config.num_steps
        key = jax.random.key(self.config.seed + 1)
        noise = self.start(key, 8)
        clear = run(model, noise, jax.random.fold_in(key, 0), steps)
        later = run(model, clear, jax.random.fold_in(key, 1), 4 * steps)
        cut = DAMAGES["circle"](key, clear)
        healed = run(model, cut, jax.random.fold_in(key, 2), steps)
        return {
            "pure noise": self.log10_error(noise),
            f"out of pure noise, {steps} steps": self.log10_error(clear),
            f"kept, {5 * steps} steps": self.log10_error(later),
            "right after a circle is cut out": self.log10_error(cut),
            f"healed, {steps} steps after the cut": self.log10_error(healed),
        }

    def pictures(self, model: NCA, folder: Path) -> list[Path]:
        """Write denoising, cut and healing as GIF and strip, and the target beside the result."""
        steps = 3 * self.config.num_steps
        film = self.film(
            model, steps, every=2, damage="circle", damage_at=2 * steps // 3, seed=self.config.seed
        )
        before_cut = film[2 * len(film) // 3 - 1]
        return self.save_film(film, folder, "denoising", before_cut=before_cut)

    def start(self, key: jax.Array, n: int) -> jax.Array:
        """Return states of noise alone, `[n, size, size, C]`."""
        return self._blend(key, jnp.ones((n, 1, 1, 1)))["state"]

    def _blend(self, key: jax.Array, share: jax.Array) -> Samples:
        """States whose RGBA is the picture with this share of noise, `[n, 1, 1, 1]`."""
        n, size = len(share), self.config.size
        noise = jax.random.normal(key, (n, size, size, 4))
        rgba = jnp.clip((1 - share) * self.target + share * noise, 0.0, 1.0)
        state = jnp.zeros((n, size, size, self.config.channels))
        return {"state": state.at[..., -4:].set(rgba)}
