"""The trainer of jax-nca: a pool, a seed in each batch, a loss over the last eight states."""

from __future__ import annotations

from contextlib import ExitStack, closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import Array
from tqdm import tqdm

import nca_kernels as nk
from nca_models.data.emoji import emoji as emoji_picture
from nca_models.data.images import fit, premultiplied
from nca_models.training import pool as pools
from nca_models.training.checkpoints import Checkpoints
from nca_models.training.damage import circle
from nca_models.training.trainer import Diverged, TrainState, stop_signals

_LAST_STATES = 8  # in the loss
_EMOJI_SIZE = 40


class ImageDataset:
    """A target image, as jax-nca's trainer takes it.

    Attributes:
        img: `[1, height, width, channels]` float32, colours times alpha.
        rgb_img: the same on white, `[1, height, width, 3]`.
        img_shape: `(height, width, channels)`.
    """

    def __init__(self, emoji: str | None = None, img: np.ndarray | None = None, img_size: int = 64):
        """Take an emoji (40 pixels, centred on `img_size`), or an image as it is.

        Raises:
            ValueError: neither or both are given, or `img` is not `[height, width, 4]`.
        """
        if (emoji is None) == (img is None):
            raise ValueError("give either an emoji or an img")
        if img is None:
            padding = (img_size - _EMOJI_SIZE) // 2
            img = premultiplied(fit(emoji_picture(emoji or ""), _EMOJI_SIZE), padding)
        if np.ndim(img) != 3 or np.shape(img)[-1] != 4:
            raise ValueError(f"img must be [height, width, 4] (RGBA), got shape {np.shape(img)}")
        self.img_shape = img.shape
        self.img = np.asarray(img, np.float32)[None]
        alpha = np.clip(self.img[..., 3:], 0, 1)
        self.rgb_img = np.clip(1 - alpha + self.img[..., :3], 0, 1)

    def get_batch(self, batch_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the image and the image on white, repeated `batch_size` times."""
        return np.repeat(self.img, batch_size, 0), np.repeat(self.rgb_img, batch_size, 0)

    def visualize(self) -> None:
        """Show the image on white with matplotlib."""
        from matplotlib import pyplot

        pyplot.imshow(self.rgb_img[0])
        pyplot.show()


class EmojiTrainer:
    """Trains an `NCA` of `nca_models.compat.jax_nca` to grow the image of a dataset.

    Attributes:
        state: a `flax.training.train_state.TrainState` once `train` has begun.
    """

    def __init__(self, dataset: Any, nca: Any, pool_size: int = 1024, n_damage: int = 0):
        """Prepare; nothing is computed yet.

        Args:
            dataset: has `img_shape` and `get_batch`, as `ImageDataset`.
            nca: an `NCA` of `nca_models.compat.jax_nca`.
            pool_size: samples kept between training steps.
            n_damage: how many samples of a batch are damaged by a circle.
        """
        self.dataset = dataset
        self.img_shape = dataset.img_shape
        self.nca = nca
        self.pool_size = pool_size
        self.n_damage = n_damage
        self.state: Any = None

    def train(
        self,
        num_epochs: int,
        batch_size: int = 8,
        seed: int = 10,
        lr: float = 0.001,
        min_steps: int = 64,
        max_steps: int = 96,
        *,
        log_dir: str | Path | None = "tensorboard_logs",
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 1000,
        progress: bool = True,
    ) -> Any:
        """Train, and return the `TrainState`; also when stopped by Ctrl-C, after the step in hand.

        The loss is that of jax-nca: the mean squared error of the last eight states' RGBA, the
        gradient scaled to norm 1, Adam. All randomness of step t comes from
        `fold_in(key(seed), t)`, so a training that goes on from a checkpoint gives the same bits.

        Args:
            num_epochs: training steps in all, those before a checkpoint included.
            batch_size: samples of a step; the first one is a seed.
            seed: of everything random.
            lr: Adam's learning rate.
            min_steps, max_steps: steps of the NCA, drawn anew for each training step; `max_steps`
                itself is not drawn.
            log_dir: where TensorBoard's files go, in a folder of their own; None for none.
            checkpoint_dir: saves there, and goes on from what is there; None to keep nothing.
            checkpoint_every: training steps between checkpoints.
            progress: whether to show a progress bar on stderr.

        Raises:
            ValueError: numbers that do not fit together.
            Diverged: the loss is not finite.
        """
        self._check(batch_size, min_steps, max_steps)
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        shape = self.img_shape[:-1]
        seeds = self.nca.create_seed(self.nca.num_hidden_channels, shape=shape)
        tx = optax.chain(_unit_norm(), optax.adam(lr))

        def begin() -> TrainState:
            params = self.nca.init(key_init, seeds, key_init)["params"]
            pool = jnp.broadcast_to(seeds, (self.pool_size, *seeds.shape[1:]))
            return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), pool)

        numbers = (min_steps, max_steps, self.n_damage)
        targets = jnp.asarray(self.dataset.get_batch(batch_size)[0])
        fixed = (tx, self.nca, jnp.asarray(seeds[0]), targets, numbers, key_steps)
        step = jax.jit(partial(_train_step, *fixed), donate_argnums=0)
        with ExitStack() as stack:
            keep = None
            if checkpoint_dir is not None:
                keep = stack.enter_context(Checkpoints(Path(checkpoint_dir)))
            state = (keep and keep.restore(jax.eval_shape(begin))) or jax.jit(begin)()
            writer = None if log_dir is None else stack.enter_context(closing(_writer(log_dir)))
            first = int(state.step)
            bar = tqdm(total=num_epochs, initial=first, unit="step", disable=not progress)
            stack.enter_context(bar)
            received = stack.enter_context(stop_signals())
            for done in range(first + 1, num_epochs + 1):
                state, metrics = step(state)
                self._report(bar, writer, done, metrics)
                last = bool(received) or done == num_epochs
                if keep is not None and (last or done % checkpoint_every == 0):
                    keep.save(done, state)
                if received:
                    bar.write(f"stopped after step {done}")
                    break
        self.state = train_state.TrainState(
            state.step, self.nca.apply, state.params, tx, state.opt_state
        )
        return self.state

    def emit_metrics(
        self,
        train_writer: Any,
        i: int,
        batch: Any,
        outputs: Any,
        targets: Any,
        loss: float,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Write one step to TensorBoard: the loss, pictures `[batch, height, width, 3]`, sums."""
        train_writer.add_scalar("loss", loss, i)
        pictures = {"batch": self.nca.to_rgb(batch), "outputs": outputs, "targets": targets}
        for name, images in pictures.items():
            train_writer.add_images(name, np.asarray(images), i, dataformats="NHWC")
        for name, value in (metrics or {}).items():
            train_writer.add_scalar(name, value, i)

    def _report(self, bar: Any, writer: Any, done: int, metrics: dict[str, Any]) -> None:
        """Show the loss of step `done`, counted from 1, and log it if there is a writer."""
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {done}: try a lower learning rate")
        bar.set_postfix_str(f"loss {loss:.3e}", refresh=False)
        bar.update()
        if writer is None:
            return
        gradients = jax.tree_util.tree_leaves_with_path(metrics["gradients"])
        sums = {"_".join(key.key for key in path): float(leaf.sum()) for path, leaf in gradients}
        batch, outputs = metrics["batch"], self.nca.to_rgb(metrics["outputs"])
        targets = self.dataset.get_batch(len(batch))[1]
        self.emit_metrics(writer, done - 1, batch, outputs, targets, loss, sums)

    def _check(self, batch_size: int, min_steps: int, max_steps: int) -> None:
        if not 0 < min_steps < max_steps:
            raise ValueError(
                f"min_steps must be above 0 and below max_steps, got {min_steps} and {max_steps}"
            )
        if not 0 < batch_size <= self.pool_size:
            raise ValueError(
                f"batch_size must be from 1 to pool_size, {self.pool_size}, got {batch_size}"
            )
        if not 0 <= self.n_damage < batch_size:
            raise ValueError(
                f"n_damage must be from 0 to batch_size - 1, {batch_size - 1} (the first sample is "
                f"a seed), got {self.n_damage}"
            )


def _train_step(
    tx: optax.GradientTransformation,
    nca: Any,
    seed: Array,
    targets: Array,
    numbers: tuple[int, int, int],
    root_key: Array,
    state: TrainState,
) -> tuple[TrainState, dict[str, Any]]:
    min_steps, max_steps, n_damage = numbers
    key = jax.random.fold_in(root_key, state.step)
    key_pool, key_damage, key_count, key_fire = jax.random.split(key, 4)
    num_steps = jax.random.randint(key_count, (), min_steps, max_steps)
    indices, batch = pools.sample(state.pool, key_pool, len(targets))
    batch = batch.at[0].set(seed)
    if n_damage:
        batch = batch.at[-n_damage:].set(circle(key_damage, batch[-n_damage:]))

    def loss_fn(params: Any) -> tuple[Array, Array]:
        return _loss(nca, params, batch, targets, key_fire, num_steps, max_steps - 1)

    (loss, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    pool = pools.update(state.pool, indices, outputs)
    metrics = {"loss": loss, "gradients": grads, "batch": batch, "outputs": outputs}
    return TrainState(state.step + 1, params, opt_state, pool), metrics


def _loss(
    nca: Any, params: Any, batch: Array, targets: Array, key: Array, num_steps: Array, most: int
) -> tuple[Array, Array]:
    """(loss, state after `num_steps`): one compiled loop of `most` steps for every `num_steps`."""
    rule, rule_params = nca.rule, nca.rule_params(params)

    def one_step(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
        state, total = carry

        def go(state: Array) -> tuple[Array, Array]:
            step_key = jax.random.fold_in(key, t)
            state = nk.step(rule, rule_params, state, step_key, backend=nca.backend)
            error = jnp.mean(jnp.square(state[..., :4] - targets))
            return state, jnp.where(t >= num_steps - _LAST_STATES, error, 0.0)

        stay = lambda state: (state, jnp.zeros(()))
        state, error = jax.lax.cond(t < num_steps, go, stay, state)
        return (state, total + error), None

    (state, total), _ = jax.lax.scan(one_step, (batch, jnp.zeros(())), jnp.arange(most))
    return total / jnp.minimum(num_steps, _LAST_STATES), state


def _unit_norm() -> optax.GradientTransformation:
    """Scales the gradient to a global norm of 1."""

    def scale(grads: Any, params: Any = None) -> Any:
        norm = optax.tree.norm(grads) + 1e-8
        return jax.tree.map(lambda g: g / norm, grads)

    return optax.stateless(scale)


def _writer(log_dir: str | Path) -> Any:
    """A TensorBoard writer in a new folder of `log_dir`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'TensorBoard logs need tensorboardX: run `pip install "nca-kernels[models]"`, '
            "or train with log_dir=None"
        ) from error
    folder = Path(log_dir) / f"EMOJITrainer_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    print(f"follow the training with: tensorboard --logdir {folder}")
    return SummaryWriter(str(folder), flush_secs=10)
