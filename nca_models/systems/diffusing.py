"""Diffusing NCA: a picture appears out of noise, and comes back when it is damaged.

After CAX (Faldor and Cully, ICLR 2025), example 43, which starts every training step from the
picture blended with noise. That is the preset `paper`. An automaton that is trained so never meets
a dead region, and a cut closes slowly or not at all; the smaller presets therefore keep a pool, and
damage what is in it. There every cell lives, too: all of them can tell how far they are from the
border, and so where the picture belongs.

A state is `[*batch, size, size, C]` float32; its last four channels are premultiplied RGBA, and
alpha, the last, says where cells live, unless all do. It starts as a blend of the picture and
noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from nca_models.data.pictures import PictureConfig
from nca_models.learning import LearnsPicture, Samples
from nca_models.modules import NCA
from nca_models.training.config import SampledStepsConfig, dropout_rate, life_threshold, setting
from nca_models.training.damage import DAMAGES


@dataclass(frozen=True, kw_only=True)
class Config(PictureConfig, SampledStepsConfig):
    """Settings of Diffusing NCA."""

    examples: ClassVar[tuple[str, ...]] = (
        "nca train diffusing --target cat.png --out cat-from-noise",
    )

    channels: int = setting(64, lowest=4, help="C; the last four channels are RGBA")
    hidden: int = setting(256, help="width of the hidden layer")
    fire_rate: float = dropout_rate()
    alive_threshold: float | None = life_threshold("alpha", "; None: every cell lives")
    noise_rate: float = setting(
        0.0, lowest=0, help="probability that a fresh sample is noise alone, without the picture"
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with (ValueError)."""
        super().__post_init__()
        if not 0 <= self.noise_rate <= 1:
            raise ValueError(f"noise_rate is {self.noise_rate}, but must be between 0 and 1")


PRESETS = {
    "paper": Config(
        target_size=40,
        padding=16,
        num_steps=64,
        min_steps=64,
        batch_size=8,
        pool_size=0,
        num_train_steps=8192,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        decay_steps=2000,
    ),
    "medium": Config(
        target_size=40,
        padding=16,
        channels=16,
        hidden=128,
        alive_threshold=None,
        noise_rate=0.5,
        num_steps=56,
        min_steps=40,
        batch_size=4,
        pool_size=128,
        final_restart_rate=0.2,
        damaged_per_batch=1,
        num_train_steps=12_000,
        learning_rate=3e-3,
        final_learning_rate=1e-5,
        gradients="normalized",
    ),
    "small": Config(
        target_size=20,
        padding=4,
        channels=24,
        hidden=128,
        alive_threshold=None,
        noise_rate=0.5,
        num_steps=48,
        min_steps=32,
        batch_size=4,
        pool_size=64,
        final_restart_rate=0.2,
        damaged_per_batch=1,
        num_train_steps=4500,
        learning_rate=3e-3,
        final_learning_rate=1e-5,
        gradients="normalized",
    ),
}


class SystemClass(LearnsPicture):
    """Diffusing NCA, as `nca_models.systems.System` asks."""

    wounds = ("circle", "half", "noise")

    def fresh(self, key: jax.Array, n: int) -> Samples:
        """Return `n` blends of picture and noise; the share of noise is uniform in 0 to 1.

        At a rate of `noise_rate` it is 1.
        """
        key_share, key_noise = jax.random.split(key)
        share = jax.random.uniform(key_share, (n, 1, 1, 1))
        if (rate := self.config.noise_rate) > 0:
            alone = jax.random.bernoulli(jax.random.fold_in(key_share, 1), rate, share.shape)
            share = jnp.where(alone, 1.0, share)
        return self._blend(key_noise, share)

    def damage(self, key: jax.Array, samples: Samples) -> Samples:
        """Return the samples, each with one of the `wounds`, at even odds."""
        key_kind, key_damage = jax.random.split(key)
        state = samples["state"]
        kind = jax.random.randint(key_kind, (len(state), 1, 1, 1), 0, len(self.wounds))
        for number, name in enumerate(self.wounds):
            state = jnp.where(kind == number, DAMAGES[name](key_damage, samples["state"]), state)
        return {"state": state}

    def metrics(self, model: NCA) -> dict[str, float]:
        """Measure denoising, persistence and healing as log10 of the mean squared error.

        Eight samples are measured, with random numbers that training never used.
        """
        clear = self.settled(model)
        noise = self.start(jax.random.key(self.config.seed + 1), 8)
        return {
            "pure noise": self.log10_error(noise),
            f"out of pure noise, {self.settling_steps} steps": self.log10_error(clear),
            **self.kept(model, clear),
            **self.healed(model, clear),
        }

    def pictures(self, model: NCA, folder: Path) -> list[Path]:
        """Write denoising, cut and healing as GIF and strip, target beside result, and healing."""
        steps = 3 * self.config.num_steps
        film = self.film(
            model, steps, every=2, damage="circle", damage_at=2 * steps // 3, seed=self.config.seed
        )
        before_cut = film[2 * len(film) // 3 - 1]
        paths = self.save_film(film, folder, "denoising", before_cut=before_cut)
        return [*paths, self.save_healing(model, self.settled(model), folder)]

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
