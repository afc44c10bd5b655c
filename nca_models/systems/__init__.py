"""The systems: one file each, found by its name.

A system file holds two names: `PRESETS`, the settings by name ("paper" and "small"), and
`SystemClass`, a class that offers what `System` lists. The trainer and the command `nca` use
nothing else, so adding a file adds a system. What several have in common is in
`nca_models.learning` (pictures and digits to learn from), `nca_models.modules` and
`nca_models.filming`.

Imports nothing heavy, so that the command line can check names before JAX starts.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import nnx

    from nca_models.training.config import TrainConfig

PRESET_NAMES = ("small", "paper")
LEARNS_DIGITS = ("attention", "self_autoencoding")
LEARNS_TEXTURE = ("dynamics",)  # the others learn a picture


class System(Protocol):
    """What the trainer and the command `nca` ask of a system.

    *Samples* are a pytree of arrays with a leading axis of the batch: what the pool keeps, such
    as `{"state": [n, *spatial, C]}`. All functions of samples can be jitted.
    """

    config: TrainConfig
    measured: str  # what the values of `metrics` are

    def __init__(self, config: Any, folder: Path) -> None:
        """Read the data that `prepare` wrote to the run's folder."""

    @staticmethod
    def prepare(config: Any, target: str | None, folder: Path) -> None:
        """Write the data of a new run to `folder`: a target picture, digits, ...

        `target` is what to learn: a file, an emoji or a folder; None for what is at hand.
        """

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return an untrained model; all of its `nnx.Param` are trained."""

    def fresh(self, key: jax.Array, n: int) -> Any:
        """Return `n` new samples."""

    def errors(self, samples: Any) -> jax.Array:
        """Return each sample's error `[n]`; the worst sample of a batch is replaced."""

    def damage(self, key: jax.Array, samples: Any) -> Any:
        """Return the samples, damaged as the settings say."""

    def loss(self, model: Any, samples: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        """Run the model on the samples: the scalar loss, and the samples for the pool."""

    def metrics(self, model: Any) -> dict[str, float]:
        """Measure a trained model: name (a phrase) to value; `measured` says of what."""

    def frames(
        self, model: Any, num_steps: int, *, every: int, damage: str, damage_at: int, seed: int
    ) -> Iterator[np.ndarray]:
        """Run from a fresh sample and yield frames, `[height, width, 3]` uint8.

        One before the first step, then one after each `every` steps and after the last.
        """

    def film(self, model: Any, num_steps: int, **options: Any) -> np.ndarray:
        """Return all frames, `[frames, height, width, 3]`; see `nca_models.filming.Films`."""

    @staticmethod
    def resized(config: Any, size: int) -> Any:
        """Return the settings for films on a square grid of `size` (ValueError if impossible)."""

    def pictures(self, model: Any, folder: Path) -> list[Path]:
        """Write pictures of a trained model to `folder` and return their paths."""


def names() -> list[str]:
    """Return the names of all systems, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Any:
    """Import the file of system `name` and return it as a module."""
    return importlib.import_module(f"{__name__}.{name}")
