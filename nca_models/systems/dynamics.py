"""Emergent dynamics: a texture that nobody asked to move, and that moves.

After "Emergent Dynamics in Neural Cellular Automata", arXiv 2404.06406: automata are trained to
look like a texture; then, with their weights fixed, the motion in what they show is measured.

A state is `[*batch, size, size, C]` float32 on a torus; its first three channels plus a half are
RGB. It starts from noise.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nca_kernels as nk
from nca_models import render
from nca_models._files import whole_file
from nca_models.data.images import open_rgba
from nca_models.data.textures import TextureConfig, elsewhere, texture
from nca_models.data.vgg16 import vgg16
from nca_models.learning import Samples, SystemBase
from nca_models.measures import motion
from nca_models.measures import textures as texture_measures
from nca_models.modules import NCA, run
from nca_models.texture_loss import feature_transport, patch_transport, pyramid, vgg16_features
from nca_models.training.config import SampledStepsConfig, setting, target_side

_SOBEL = np.outer([1.0, 2.0, 1.0], [-1.0, 0.0, 1.0])
_LAPLACIAN = np.ones((3, 3)) - 9 * np.outer([0, 1, 0], [0, 1, 0])
FILTERS = np.stack([_SOBEL, _SOBEL.T, _LAPLACIAN], axis=-1)  # in addition to the cell itself
TARGET, ELSEWHERE = "target.png", "elsewhere.png"
STRIDE, FRAMES = 32, 100  # motion is measured over FRAMES frames that are STRIDE steps apart


@dataclass(frozen=True, kw_only=True)
class Config(TextureConfig, SampledStepsConfig):
    """Settings of emergent dynamics."""

    target_size: int = target_side(lowest=20)
    channels: int = setting(12, lowest=3, short="c", help="C; the first three channels are RGB")
    hidden: int = setting(96, short="d", help="D, the width of the hidden layer")
    fire_rate: float = setting(0.5, help="probability that a cell updates in a step")
    overflow: float = setting(1.0, lowest=0, help="weight of the penalty on states beyond -1 to 1")
    vgg16: str | None = setting(
        None,
        flag="--vgg16",
        metavar="FILE",
        help="weights of a VGG16 (.pth, .npz, .h5), whose features are compared instead of patches",
    )


PRESETS = {
    "paper": Config(
        target_size=128,
        channels=64,
        hidden=64,
        num_steps=96,
        min_steps=32,
        batch_size=4,
        pool_size=256,
        num_train_steps=6000,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        decay_steps=6000,
    ),
    "medium": Config(
        target_size=64,
        channels=12,
        hidden=96,
        num_steps=48,
        min_steps=32,
        batch_size=4,
        pool_size=128,
        restart_rate=0.25,
        num_train_steps=4000,
        learning_rate=2e-3,
        final_learning_rate=2e-5,
    ),
    "small": Config(
        target_size=40,
        channels=12,
        hidden=48,
        num_steps=40,
        min_steps=24,
        batch_size=4,
        pool_size=64,
        restart_rate=0.25,
        num_train_steps=3000,
        learning_rate=2e-3,
        final_learning_rate=2e-5,
    ),
}


class SystemClass(SystemBase):
    """Emergent dynamics, as `nca_models.systems.System` asks."""

    measured = (
        "log10 of the texture loss, distances of textures from 0 to 1, motion in cells per 32 steps"
    )
    measures = ("log10_texture_loss", "distance_to_exemplar", "motion", "motion_spread")
    mapped = ("motion", "cells per 32 steps")

    def __init__(self, config: Config, folder: Path):
        """Read the texture of the run in `folder`."""
        self.config = config
        self.exemplar = np.asarray(open_rgba(folder / TARGET).convert("RGB"))
        self.elsewhere = None
        if (folder / ELSEWHERE).exists():
            self.elsewhere = np.asarray(open_rgba(folder / ELSEWHERE).convert("RGB"))
        self.target = jnp.asarray(self.exemplar, jnp.float32) / 255
        self.features, self.transport = pyramid, patch_transport
        if config.vgg16 is not None:
            self.features = partial(vgg16_features, vgg16(Path(config.vgg16)))
            self.transport = feature_transport
        self.learned = self.features(self.target[None])

    @staticmethod
    def prepare(config: Config, target: str | None, folder: Path) -> None:
        """Write `target.png`: a file or a texture at hand, which `target` says (None: brick).

        Where there is more of the texture, `elsewhere.png` is a second crop of it.
        """
        if config.vgg16 is not None:
            vgg16(Path(config.vgg16))  # a file that cannot be read fails before training starts
        size = config.target_size
        crops = {TARGET: texture(target, size), ELSEWHERE: elsewhere(target, size)}
        for name, crop in crops.items():
            if crop is not None:
                with whole_file(folder / name) as temporary:
                    crop.save(temporary)

    def model(self, rngs: nnx.Rngs) -> NCA:
        """Return an untrained automaton; its taps are constant and not normalised."""
        rule = nk.Rule(fire_rate=self.config.fire_rate, padding="circular", alive=None)
        return NCA(
            self.config.channels,
            (self.config.hidden,),
            filters=("identity", FILTERS),
            rule=rule,
            backend=self.config.backend,
            rngs=rngs,
        )

    def fresh(self, key: jax.Array, n: int) -> Samples:
        """Return `n` states of noise, uniform in -0.5 to 0.5."""
        shape = (n, self.config.target_size, self.config.target_size, self.config.channels)
        return {"state": jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)}

    def errors(self, samples: Samples) -> jax.Array:
        """Return each sample's texture loss `[n]`, always along the same directions."""
        return self._errors(samples["state"], jax.random.key(0))

    def loss(self, model: NCA, samples: Samples, key: jax.Array) -> tuple[jax.Array, Samples]:
        """Return texture loss and overflow at a random step of each sample, and those states."""
        *keys, key_directions = jax.random.split(key, 3)
        new = self.after_random_steps(model, samples, keys)
        state = new["state"]
        overflow = jnp.mean(jnp.abs(state - jnp.clip(state, -1.0, 1.0)))
        loss = jnp.mean(self._errors(state, key_directions)) + self.config.overflow * overflow
        return loss, new

    def metrics(self, model: NCA) -> dict[str, float]:
        """Measure the texture early and late, what it looks like, and how it moves.

        What it looks like is told by `nca_models.measures.textures`, which training never sees.
        """
        steps = 2 * self.config.num_steps
        key = jax.random.key(self.config.seed + 1)
        noise = self.fresh(key, 4)["state"]
        early = run(model, noise, jax.random.fold_in(key, 0), steps)
        late = run(model, early, jax.random.fold_in(key, 1), 1000)
        strengths = [self.motion_strength(model, seed) for seed in range(3)]
        return {
            "noise": self.log10_error(noise),
            "out of noise": self.log10_error(early),
            "kept, 1,000 steps later": self.log10_error(late),
            **self._likeness([self.picture(state) for state in late]),
            "motion, mean over three seeds": float(np.mean(strengths)),
            "motion, standard deviation over them": float(np.std(strengths, ddof=1)),
        }

    def _likeness(self, results: list[np.ndarray]) -> dict[str, float]:
        """How far results are from the exemplar and from other textures, by name."""
        distances = texture_measures.distances(results, self.exemplar)
        measured = {"distance to the exemplar": distances.pop("exemplar")}
        if self.elsewhere is not None:
            apart = texture_measures.distance(self.exemplar, self.elsewhere)
            measured["distance of two crops of the exemplar"] = apart
        other = min(distances, key=distances.__getitem__)
        measured[f"distance to the nearest of {len(distances)} others, {other}"] = distances[other]
        return measured

    def swept(self, model: NCA) -> tuple[float, ...]:
        """Return the `measures` of a model, its texture late; see `System.swept`."""
        measured = self.metrics(model)
        late = next(value for name, value in measured.items() if name.startswith("kept"))
        motion, spread = list(measured.values())[-2:]
        return late, measured["distance to the exemplar"], motion, spread

    def motion_strength(self, model: NCA, seed: int) -> float:
        """Return the mean length of the optical flow, in cells per `STRIDE` steps.

        The flow is that between successive frames, `FRAMES` in all and `STRIDE` steps apart, after
        the texture has formed.
        """
        key = jax.random.fold_in(jax.random.key(self.config.seed + 2), seed)
        state = run(model, self.fresh(key, 1)["state"], key, 4 * self.config.num_steps)
        frames = self.frames_from(model, state, STRIDE * (FRAMES - 1), every=STRIDE, key=key)
        return motion.strength(np.stack(list(frames)))

    @staticmethod
    def resized(config: Config, size: int) -> Config:
        """See `System.resized`: a larger or smaller torus of the same texture."""
        return replace(config, target_size=size)

    def film_start(self, key: jax.Array, seed: int) -> jax.Array:
        """Return a state of noise."""
        return self.fresh(key, 1)["state"]

    def pictures(self, model: NCA, folder: Path) -> list[Path]:
        """Write exemplar beside result, a film of the texture, and its flow drawn on a frame."""
        size = self.config.target_size
        steps, scale = 2 * self.config.num_steps, max(1, 240 // size)
        film = self.film(model, steps + 60 * 4, every=4, seed=self.config.seed)
        paths = [folder / name for name in ("exemplar_and_result.png", "texture.gif", "flow.png")]
        exemplar = (np.asarray(self.target) * 255).round().astype(np.uint8)
        render.save_png(paths[0], render.upscale(render.beside([exemplar, film[-1]]), scale))
        render.save_gif(paths[1], render.upscale(film, max(1, 144 // size)))
        pair = film[[-1 - STRIDE // 4, -1]]
        render.save_flow_plot(paths[2], pair[0], motion.flow(pair)[0])
        return paths

    def picture(self, state: jax.Array) -> np.ndarray:
        """Return a state `[size, size, C]` as uint8 RGB."""
        rgb = np.clip(np.nan_to_num(np.asarray(state[..., :3])) + 0.5, 0, 1)
        return (rgb * 255).round().astype(np.uint8)

    def _errors(self, state: jax.Array, key: jax.Array) -> jax.Array:
        return self.transport(self.features(state[..., :3] + 0.5), self.learned, key)
