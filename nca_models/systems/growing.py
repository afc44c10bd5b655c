"""Growing NCA: a single living cell grows into a picture, keeps it, and regrows what is cut away.

After Mordvintsev et al., "Growing Neural Cellular Automata", Distill, 2020
(https://distill.pub/2020/growing-ca), in the form that CAX gives it.

A state is `[*batch, size, size, C]` float32; its last four channels are premultiplied RGBA, and
alpha, the last, says where cells live.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from nca_models.data.pictures import PictureConfig
from nca_models.learning import LearnsPicture, Samples
from nca_models.modules import NCA
from nca_models.training import DAMAGE_NAMES
from nca_models.training.config import SampledStepsConfig, dropout_rate, life_threshold, setting
from nca_models.training.damage import DAMAGES


@dataclass(frozen=True, kw_only=True)
class Config(PictureConfig, SampledStepsConfig):
    """Settings of Growing NCA."""

    commands: ClassVar[tuple[str, ...]] = ("demo",)
    examples: ClassVar[tuple[str, ...]] = (
        "nca train growing --target cat.png --out cat",
        "nca train growing --target 🦎 --preset paper --out lizard",
        "nca train growing --out lizard --resume",
        "nca train growing --preset paper --estimate   what it will take, before it starts",
    )

    channels: int = setting(16, lowest=4, help="C; the last four channels are RGBA")
    hidden: int = setting(128, help="width of the hidden layer")
    fire_rate: float = dropout_rate()
    alive_threshold: float = life_threshold("alpha")
    damage: str = setting(
        "circle",
        flag="--damage",
        choices=DAMAGE_NAMES,
        help="what is done to `--damaged-per-batch` samples",
    )


PRESETS = {
    "paper": Config(
        target_size=40,
        padding=16,
        num_steps=128,
        min_steps=65,
        batch_size=8,
        pool_size=1024,
        num_train_steps=8192,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        decay_steps=2000,
    ),
    "medium": Config(
        target_size=40,
        padding=16,
        num_steps=56,
        min_steps=40,
        batch_size=4,
        pool_size=128,
        damaged_per_batch=1,
        damage="mixed",
        final_restart_rate=0.05,
        restarts_fall_after=0.7,
        num_train_steps=14_000,
        learning_rate=4e-3,
        final_learning_rate=1e-5,
        gradients="normalized",
    ),
    "small": Config(
        target_size=20,
        padding=5,
        hidden=128,
        num_steps=36,
        min_steps=26,
        batch_size=4,
        pool_size=48,
        damaged_per_batch=1,
        damage="mixed",
        num_train_steps=9600,
        learning_rate=4e-3,
        final_learning_rate=1e-5,
    ),
}


class SystemClass(LearnsPicture):
    """Growing NCA, as `nca_models.systems.System` asks."""

    wounds = ("circle", "left", "right", "top", "bottom")

    def fresh(self, key: jax.Array, n: int) -> Samples:
        """Return `n` seeds: a single cell in the middle whose alpha is 1, all else zero."""
        size, middle = self.config.size, self.config.size // 2
        state = jnp.zeros((n, size, size, self.config.channels))
        return {"state": state.at[:, middle, middle, -1].set(1.0)}

    def damage(self, key: jax.Array, samples: Samples) -> Samples:
        """Return the samples, each damaged in its own way."""
        return {"state": DAMAGES[self.config.damage](key, samples["state"])}

    def metrics(self, model: NCA) -> dict[str, float]:
        """Measure growth, persistence and regrowth as log10 of the mean squared error.

        Eight samples are measured, with random numbers that training never used.
        """
        grown = self.settled(model)
        return {
            f"grown from one cell, {self.settling_steps} steps": self.log10_error(grown),
            **self.kept(model, grown),
            **self.healed(model, grown),
        }

    def pictures(self, model: NCA, folder: Path) -> list[Path]:
        """Write growth, cut and regrowth as GIF and strip, target beside result, and healing."""
        steps = 4 * self.config.num_steps
        film = self.film(
            model, steps, every=2, damage="right", damage_at=steps // 2, seed=self.config.seed
        )
        paths = self.save_film(film, folder, "growth", before_cut=film[len(film) // 2 - 1])
        return [*paths, self.save_healing(model, self.settled(model), folder)]
