"""Base classes of systems: of all systems, of those that learn a picture, and of those for digits.

What a run learns, a picture or digits, is stored in the folder of the run.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nca_kernels as nk
from nca_models import render
from nca_models.data import digits, images, pictures
from nca_models.measures import digits as digit_measures
from nca_models.modules import NCA, Automaton, run
from nca_models.systems import System
from nca_models.training.damage import DAMAGES
from nca_models.training.logging import log10

Samples = dict[str, jax.Array]
SQUARED_ERROR = "log10 of the mean squared error"
SETTLING = 200  # steps, unless a training step has more
TESTED = 256  # digits that training never saw, with which it is measured
HEALING = (0, 10, 25, 50, 100, 150, 200)  # steps after a damage at which the error is measured


def dropout_rule(config: Any) -> nk.Rule:
    """Return the rule of CAX's updates, which are scaled by the inverse of the fire rate.

    `config` has `fire_rate` and, where cells can be dead, `alive_threshold`: the last channel then
    says which cells live.
    """
    threshold = getattr(config, "alive_threshold", None)
    return nk.Rule(
        fire_rate=config.fire_rate,
        step_size=1 / config.fire_rate,
        alive=None if threshold is None else nk.Alive(channel=-1, threshold=threshold),
    )


def log10_mean(errors: jax.Array) -> float:
    """Return log10 of the mean of errors."""
    return log10(float(jnp.mean(errors)))


class SystemBase(System):
    """What systems have in common: loss, films, what a sweep measures, no damage in training.

    A system has a config, `film_start` and `picture`, and samples `{"state": [n, *spatial, C]}`
    with what else belongs to a sample.

    Attributes:
        learned: all that distinguishes systems of the same settings, as a pytree of arrays; None if
            that is not known.
        measures, mapped: see `System`.
    """

    config: Any
    learned: Any = None
    measures: tuple[str, ...] = ("log10_error",)
    mapped = ("log10_error", "after num_steps steps")
    num_spatial_dims = 2

    def film_start(self, key: jax.Array, seed: int) -> jax.Array:
        """Return the state that films start from, `[1, *spatial, C]`."""
        raise NotImplementedError

    def picture(self, state: jax.Array) -> np.ndarray:
        """Return a state `[*spatial, C]` as `[height, width, 3]` uint8 RGB."""
        raise NotImplementedError

    def damage(self, key: jax.Array, samples: Samples) -> Samples:
        """Return the samples as they are: nothing is damaged in training."""
        return samples

    def loss(self, model: Any, samples: Samples, key: jax.Array) -> tuple[jax.Array, Samples]:
        """Return the mean of the samples' errors after their steps, and the samples then.

        That is after `num_steps`, or, where the settings have `min_steps`, after a random number.
        """
        if hasattr(self.config, "min_steps"):
            new = self.after_random_steps(model, samples, jax.random.split(key))
        else:
            steps = self.config.num_steps
            final = model.rollout(samples["state"], key, steps, checkpoint="all")
            new = {**samples, "state": final}
        return jnp.mean(self.errors(new)), new

    def swept(self, model: Any) -> tuple[float, ...]:
        """Return log10 of the mean error of 64 fresh samples after `num_steps`."""
        samples = self.fresh(jax.random.key(self.config.seed + 1), 64)
        key = jax.random.key(self.config.seed + 2)
        state = run(model, samples["state"], key, self.config.num_steps)
        return (log10_mean(self.errors({**samples, "state": state})),)

    def log10_error(self, state: jax.Array) -> float:
        """Return log10 of the mean error of states `[n, *spatial, C]`."""
        return log10_mean(self.errors({"state": state}))

    def after_random_steps(self, model: Any, samples: Samples, keys: Any) -> Samples:
        """Return each sample after a random number of steps, from `min_steps` to `num_steps`.

        `keys` are two keys: the rollout's, and that of the random numbers of steps.
        """
        key_rollout, key_steps = keys
        state, least, most = samples["state"], self.config.min_steps, self.config.num_steps
        steps = jax.random.randint(key_steps, state.shape[:1], least, most + 1)
        _, sampled = model.rollout(state, key_rollout, most, sample_steps=steps, checkpoint="all")
        return {**samples, "state": sampled}

    def film(self, model: Any, num_steps: int, **options: Any) -> np.ndarray:
        """Return all that `frames` yields as an array `[frames, height, width, 3]` uint8."""
        return np.stack(list(self.frames(model, num_steps, **options)))

    def frames(
        self, model: Any, num_steps: int, *, seed: int = 0, **options: Any
    ) -> Iterator[np.ndarray]:
        """Run from `film_start`; `options` are those of `frames_from`. See `System.frames`."""
        key = jax.random.key(seed)
        return self.frames_from(model, self.film_start(key, seed), num_steps, key=key, **options)

    def frames_from(
        self,
        model: Automaton,
        start: jax.Array,
        num_steps: int,
        *,
        every: int,
        key: jax.Array,
        damage: str = "none",
        damage_at: int = 0,
    ) -> Iterator[np.ndarray]:
        """Run from the state `start`, `[1, *spatial, C]`, and yield pictures; see `System.frames`.

        The damage is done after `damage_at` steps. A model that runs in tiles overwrites `start`.
        """
        key, key_damage = jax.random.split(key)
        yield self.picture(start[0])
        state, done = start, 0
        while done < num_steps:
            stops = (num_steps, (done // every + 1) * every, damage_at)
            stop = min(stop for stop in stops if stop > done)
            state = run(model, state, jax.random.fold_in(key, done), stop - done, donate=True)
            done = stop
            if done == damage_at:
                state = DAMAGES[damage](key_damage, state, self.num_spatial_dims)
            if done % every == 0 or done == num_steps:
                yield self.picture(state[0])


class LearnsPicture(SystemBase):
    """A system whose last four channels learn to show a picture, as premultiplied RGBA.

    Its config has `target_size` and `padding`; samples are `{"state": [n, size, size, C]}`.

    Attributes:
        wounds: names of the damages after which it is measured.
    """

    measured = SQUARED_ERROR
    wounds: tuple[str, ...] = ("circle", "half")

    def __init__(self, config: Any, folder: Path):
        """Read the target of the run in `folder`."""
        self.config = config
        picture = images.open_rgba(folder / "target.png")
        self.learned = jnp.asarray(images.premultiplied(picture, config.padding))

    @property
    def target(self) -> jax.Array:
        """The picture, `[size, size, 4]` premultiplied RGBA."""
        target: jax.Array = self.learned
        return target

    @staticmethod
    def prepare(config: Any, target: str | None, folder: Path) -> None:
        """Write `target.png`: an image file, an emoji or (None) the packaged picture, scaled."""
        pictures.save_target(target, config.target_size, folder / "target.png")

    def model(self, rngs: nnx.Rngs) -> NCA:
        """Return an untrained automaton; its taps, identity and Sobel, are constant."""
        return NCA(
            self.config.channels,
            (self.config.hidden,),
            rule=dropout_rule(self.config),
            backend=self.config.backend,
            rngs=rngs,
        )

    def start(self, key: jax.Array, n: int) -> jax.Array:
        """Return `n` states for films to start from, `[n, size, size, C]`: fresh samples."""
        return self.fresh(key, n)["state"]

    @staticmethod
    def resized(config: Any, size: int) -> Any:
        """See `System.resized`: the picture keeps its size, and the padding changes."""
        if size < config.target_size:
            raise ValueError(f"{size} is below the picture's own size of {config.target_size}")
        return replace(config, padding=(size - config.target_size) // 2)

    def film_start(self, key: jax.Array, seed: int) -> jax.Array:
        """Return a state of `start`."""
        return self.start(key, 1)

    def save_film(
        self, film: np.ndarray, folder: Path, name: str, *, before_cut: np.ndarray
    ) -> list[Path]:
        """Write a film `[frames, H, W, C]` as GIF and strip, and the target beside one frame.

        The files are `name`.gif, `name`.png and target_and_result.png; returns their paths.
        `before_cut` `[H, W, C]` is the frame before the damage.
        """
        scale = max(1, 320 // self.config.size)
        paths = [folder / file for file in (f"{name}.gif", f"{name}.png", "target_and_result.png")]
        render.save_gif(paths[0], render.upscale(film, scale))
        render.save_png(paths[1], render.upscale(render.strip(film, 9), max(1, scale // 2)))
        pair = render.beside([self.picture(self.target), before_cut])
        render.save_png(paths[2], render.upscale(pair, scale))
        return paths

    @property
    def settling_steps(self) -> int:
        """After so many steps from its start, a picture is to be there."""
        return max(SETTLING, self.config.num_steps)

    def settled(self, model: Automaton) -> jax.Array:
        """Return eight pictures, `[8, size, size, C]`, after `settling_steps` from `start`.

        Their random numbers are none that training used.
        """
        key = jax.random.key(self.config.seed + 1)
        start = self.start(key, 8)
        pictures: jax.Array = run(model, start, jax.random.fold_in(key, 0), self.settling_steps)
        return pictures

    def kept(self, model: Automaton, state: jax.Array) -> dict[str, float]:
        """Measure `settled` pictures `[n, size, size, C]` 1,000 and 10,000 steps later, by name."""
        measured, taken = {}, 0
        for steps in (1000, 10_000):
            key = jax.random.fold_in(jax.random.key(self.config.seed + 2), steps)
            state, taken = run(model, state, key, steps - taken), steps
            measured[f"kept, {steps:,} steps later"] = self.log10_error(state)
        return measured

    def healing(self, model: Automaton, state: jax.Array) -> dict[str, list[float]]:
        """Return log10 of the error at `HEALING` steps after each of the system's `wounds`.

        `state` `[n, size, size, C]` is whole; each sample is damaged in its own way.
        """
        key, over_time = jax.random.key(self.config.seed + 3), {}
        for number, name in enumerate(self.wounds):
            key_wound, key_steps = jax.random.split(jax.random.fold_in(key, number))
            hurt, errors = DAMAGES[name](key_wound, state), []
            for since, steps in zip((0, *HEALING), HEALING, strict=False):
                key_steps = jax.random.fold_in(key_steps, steps)
                hurt = run(model, hurt, key_steps, steps - since) if steps else hurt
                errors.append(self.log10_error(hurt))
            over_time[name] = errors
        return over_time

    def save_healing(self, model: Automaton, state: jax.Array, folder: Path) -> Path:
        """Plot `healing` of whole states `[n, size, size, C]`, and return the path."""
        path = folder / "healing.png"
        labels = ("steps after the damage", SQUARED_ERROR)
        render.save_curves(path, HEALING, self.healing(model, state), labels)
        return path

    def healed(self, model: Automaton, state: jax.Array) -> dict[str, float]:
        """Measure `healing` right after each wound and at last, by name."""
        return {
            f"{name}: {when}": value
            for name, errors in self.healing(model, state).items()
            for when, value in (
                ("right after", errors[0]),
                (f"{HEALING[-1]} steps later", errors[-1]),
            )
        }

    def errors(self, samples: Samples) -> jax.Array:
        """Return each sample's mean squared error `[n]` of RGBA."""
        return jnp.mean((samples["state"][..., -4:] - self.target) ** 2, axis=(1, 2, 3))

    def picture(self, state: jax.Array) -> np.ndarray:
        """Return a state `[size, size, C]` as uint8 RGB over white."""
        return render.over_white(np.asarray(state[..., -4:]))


class LearnsDigits(SystemBase):
    """A system that is shown digits; its config has `target_size`.

    Samples are `{"state": [n, *spatial, C], "index": [n]}`, the index that of a training digit.
    """

    measured = f"{SQUARED_ERROR}, and shares of {TESTED} unseen digits in percent"

    def __init__(self, config: Any, folder: Path):
        """Read the digits of the run in `folder`."""
        self.config = config
        self.data = digits.load(folder / "digits.npz")
        self.train_images = jnp.asarray(self.data.train_images)  # [n, size, size]

    @staticmethod
    def prepare(config: Any, target: str | None, folder: Path) -> None:
        """Write `digits.npz`: MNIST from the folder `target`, or scikit-learn's digits (None)."""
        data = digits.digits(config.target_size, None if target is None else Path(target))
        digits.save(data, folder / "digits.npz")

    def showing(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Return states `[n, *spatial, C]` that are shown `images` `[n, size, size]`."""
        raise NotImplementedError

    @cached_property
    def tested(self) -> tuple[jax.Array, np.ndarray]:
        """Digits that training never saw, `[n, size, size]`, and what they are, `[n]`."""
        return jnp.asarray(self.data.test_images[:TESTED]), self.data.test_labels[:TESTED]

    @cached_property
    def mean(self) -> jax.Array:
        """The mean of the digits that are trained on, `[size, size]`."""
        return jnp.mean(self.train_images, axis=0)

    def read(self, images: Any) -> float:
        """Return the share of `tested`, in percent, that a classifier reads right from `images`."""
        right = self._classifier(np.asarray(images)) == self.tested[1]
        return digit_measures.percent(right)

    @cached_property
    def _classifier(self) -> Callable[[np.ndarray], np.ndarray]:
        return digit_measures.classifier(self.data)

    def film_start(self, key: jax.Array, seed: int) -> jax.Array:
        """Return a state that is shown an unseen digit."""
        image = self.data.test_images[seed % len(self.data.test_images)]
        return self.showing(key, jnp.asarray(image)[None])

    def save_rows(self, path: Path, *rows: jax.Array) -> None:
        """Write rows of digits, `[n, size, size]` each, one row below the other."""
        pictures = [render.beside(list(map(render.grey, np.asarray(row)))) for row in rows]
        scale = max(1, 96 // self.config.target_size)
        render.save_png(path, render.upscale(render.above(pictures), scale))

    @staticmethod
    def resized(config: Any, size: int) -> Any:
        """See `System.resized`: it is impossible, because digits have one size."""
        raise ValueError(
            f"digits are {config.target_size} x {config.target_size} here, and stay so"
        )
