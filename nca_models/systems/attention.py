"""Attention NCA: half of a digit's pixels are masked, and the cells fill them in.

After CAX (Faldor and Cully, ICLR 2025), example 47, and Tesfaldet et al., "Attention-based Neural
Cellular Automata" (ViTCA), NeurIPS 2022, arXiv 2211.01233. Each cell attends to the cells around
it, at a cost that is linear in the number of cells; the originals mask the attention of all cells
to all cells.

A state is `[*batch, size, size, C]` float32; its last channel is the picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nca_kernels as nk
from nca_models import render
from nca_models.data.digits import DigitsConfig
from nca_models.learning import LearnsDigits, Samples, dropout_rule
from nca_models.modules import Automaton, mlp_layers, position_embeddings, run
from nca_models.training.config import dropout_rate, setting
from nca_models.training.logging import log10

MEASURED_RATIOS = (0.5, 0.75)  # shares of masked pixels, beside that of the settings


@dataclass(frozen=True, kw_only=True)
class Config(DigitsConfig):
    """Settings of the attention NCA."""

    examples: ClassVar[tuple[str, ...]] = (
        "nca train attention --data-dir mnist --preset paper --out digits",
    )

    channels: int = setting(32, lowest=2, help="C; the last channel is the picture")
    projection: int = setting(32, help="width that the state is projected to")
    position: int = setting(4, help="width of the position embedding of one axis")
    heads: int = setting(4, help="heads of the attention")
    qkv: int = setting(
        128, help="width of queries, keys and values, all heads together; a multiple of `heads`"
    )
    perception: int = setting(64, help="width of the attention's output")
    hidden: int = setting(128, help="width of the update's hidden layer")
    radius: int = setting(1, lowest=0, help="how many cells away a cell attends")
    num_steps: int = setting(
        help="steps of the automaton in a training step; the loss is at the last one"
    )
    fire_rate: float = dropout_rate()
    mask_ratio: float = setting(0.5, help="share of the pixels that are masked")

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with (ValueError)."""
        super().__post_init__()
        if self.qkv % self.heads:
            raise ValueError(f"qkv is {self.qkv}, not a multiple of heads ({self.heads})")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}, but must be between 0 and 1")


PRESETS = {
    "paper": Config(
        target_size=28,
        num_steps=32,
        batch_size=4,
        pool_size=1024,
        num_train_steps=8196,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        decay_steps=4096,
    ),
    # Most of a batch is fresh: where only the worst is, the pool is soon full of easy digits.
    "medium": Config(
        target_size=16,
        num_steps=24,
        batch_size=8,
        pool_size=64,
        restarts_per_batch=6,
        num_train_steps=5000,
        learning_rate=1e-3,
        final_learning_rate=2e-5,
    ),
    "small": Config(
        target_size=12,
        channels=16,
        projection=16,
        qkv=64,
        perception=32,
        hidden=96,
        num_steps=16,
        batch_size=8,
        pool_size=64,
        restarts_per_batch=6,
        num_train_steps=4000,
        learning_rate=2e-3,
        final_learning_rate=2e-5,
    ),
}


class AttentionNCA(Automaton):
    """Projection, position embeddings, attention to the neighbourhood, and a residual update."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Build the layers; the last one starts from zeros."""
        c = config
        self.project = nnx.Linear(c.channels, c.projection, rngs=rngs)
        self.position = nnx.Embed(c.target_size, c.position, rngs=rngs)
        width = c.projection + 2 * c.position
        self.query, self.key, self.value = (nnx.Linear(width, c.qkv, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(c.qkv, c.perception, rngs=rngs)
        self.hidden = nnx.Linear(c.perception, c.hidden, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.last = nnx.Linear(c.hidden, c.channels, kernel_init=zeros, rngs=rngs)
        self.heads, self.radius, self.backend = c.heads, c.radius, c.backend
        self.rule = dropout_rule(c)

    def perceive(self, state: jax.Array) -> jax.Array:
        """Attend: `[*batch, height, width, C]` to `[*batch, height, width, perception]`."""
        positions = position_embeddings(self.position, state, 2)
        tokens = jnp.concatenate([self.project(state), *positions], axis=-1)
        query, key, value = (
            layer(tokens).reshape(*state.shape[:-1], self.heads, -1)
            for layer in (self.query, self.key, self.value)
        )
        attended = nk.neighborhood_attention(query, key, value, self.radius, backend=self.backend)
        return self.out(attended.reshape(*state.shape[:-1], -1))

    def cost(self) -> nk.Cost:
        """See `Automaton.cost`: it counts the products of all layers and of the attention."""
        layers = (self.project, self.query, self.key, self.value, self.out, self.hidden, self.last)
        neighbours = (2 * self.radius + 1) ** 2
        macs = sum(layer.in_features * layer.out_features for layer in layers)
        macs += 2 * neighbours * self.query.out_features
        state = 4 * self.project.in_features  # bytes
        # The backward recomputes everything but the last layer.
        recomputed = macs - self.last.in_features * self.last.out_features
        return nk.Cost(2 * macs, 2 * recomputed + 4 * macs, 2 * state, 3 * state)

    def __call__(self, state: jax.Array, key: jax.Array) -> jax.Array:
        """Take one step; see `Automaton`."""
        perception = jax.checkpoint(self.perceive)(state)
        layers = mlp_layers((self.hidden, self.last))
        return nk.update(self.rule, layers, state, perception, key, backend=self.backend)


class SystemClass(LearnsDigits):
    """The attention NCA, as `nca_models.systems.System` asks."""

    def model(self, rngs: nnx.Rngs) -> AttentionNCA:
        """Return an untrained automaton."""
        return AttentionNCA(self.config, rngs=rngs)

    def fresh(self, key: jax.Array, n: int) -> Samples:
        """Return `n` digits, masked."""
        key_index, key_mask = jax.random.split(key)
        index = jax.random.randint(key_index, (n,), 0, len(self.train_images))
        return {"state": self.showing(key_mask, self.train_images[index]), "index": index}

    def errors(self, samples: Samples) -> jax.Array:
        """Return each sample's mean squared error `[n]` over all pixels, masked or not."""
        images = self.train_images[samples["index"]]
        return jnp.mean((samples["state"][..., -1] - images) ** 2, axis=(1, 2))

    def metrics(self, model: AttentionNCA) -> dict[str, float]:
        """Measure masked pixels of digits that training never saw, and what is read of digits."""
        steps = self.config.num_steps
        key = jax.random.key(self.config.seed + 1)
        images, _ = self.tested
        measured = {"whole digits that a classifier reads, %": self.read(images)}
        for ratio in sorted({self.config.mask_ratio, *MEASURED_RATIOS}):
            state, masked = self._masked(key, images, ratio)
            final = run(model, state, jax.random.fold_in(key, 0), steps)
            later = run(model, final, jax.random.fold_in(key, 1), 3 * steps)

            def error(guess: jax.Array, masked: jax.Array = masked) -> float:
                return log10(float(jnp.sum(masked * (guess - images) ** 2) / jnp.sum(masked)))

            measured |= {
                f"{ratio:.0%} masked: the mean digit for every digit": error(self.mean),
                f"{ratio:.0%} masked: masked pixels": error(final[..., -1]),
                f"{ratio:.0%} masked: masked pixels, 4 times as many steps": error(later[..., -1]),
                f"{ratio:.0%} masked: digits that are read, %": self.read(state[..., -1]),
                f"{ratio:.0%} masked: once completed, %": self.read(final[..., -1]),
            }
        return measured

    def showing(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Return states that show the unmasked pixels of `images` `[n, size, size]`."""
        return self._masked(key, images, self.config.mask_ratio)[0]

    def picture(self, state: jax.Array) -> np.ndarray:
        """Return the digit that a state shows, as uint8 RGB."""
        return render.grey(np.asarray(state[..., -1]))

    def pictures(self, model: AttentionNCA, folder: Path) -> list[Path]:
        """Write unseen digits (masked, completed and whole), and a film of a completion."""
        key, scale = jax.random.key(self.config.seed + 1), max(1, 96 // self.config.target_size)
        images = jnp.asarray(self.data.test_images[:10])
        state = self.showing(key, images)
        final = run(model, state, key, self.config.num_steps)
        paths = [folder / name for name in ("masked_result_truth.png", "completion.gif")]
        self.save_rows(paths[0], state[..., -1], final[..., -1], images)
        steps = 2 * self.config.num_steps
        film = self.film(model, steps, every=1)
        render.save_gif(paths[1], render.upscale(film, 2 * scale))
        return paths

    def _masked(
        self, key: jax.Array, images: jax.Array, ratio: float
    ) -> tuple[jax.Array, jax.Array]:
        """States that show the unmasked pixels of `images` `[n, size, size]`, and the mask."""
        masked = jax.random.bernoulli(key, ratio, images.shape)
        state = jnp.zeros((*images.shape, self.config.channels))
        return state.at[..., -1].set(jnp.where(masked, 0.0, images)), masked
