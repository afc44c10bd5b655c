"""The trainer of jax-nca, with fused steps.

It keeps a pool of samples, puts a seed into each batch, and averages the loss over the last eight
states of a rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import Array

import nca_kernels as nk
from nca_models.training import pool as pools
from nca_models.training.damage import circle

if TYPE_CHECKING:  # at run time where they are used: to import the NCA takes flax and optax alone
    from nca_models.training.trainer import TrainState

_LAST_STATES = 8  # which the loss is the mean of
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
            from nca_models.data.emoji import emoji as emoji_picture
            from nca_models.data.images import fit, premultiplied

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
        """Train, and return the `TrainState`; Ctrl-C ends the training after the current step.

        The positional parameters are those of jax-nca, and so are the loss, the mean squared error
        of the last eight states' RGBA, and the optimizer: gradients scaled to norm 1, then Adam.
        All randomness of step t comes from `fold_in(key(seed), t)`, so a training that goes on
        from a checkpoint gives the same bits.

        Args:
            num_epochs: training steps in all, those before a checkpoint included.
            batch_size: samples of a training step; the first is a seed.
            seed: seed of all random numbers.
            lr: Adam's learning rate.
            min_steps, max_steps: each training step draws its number of the NCA's steps from
                `min_steps` to `max_steps - 1`.
            log_dir: TensorBoard's files go to a new folder in it; None to write none.
            checkpoint_dir: where checkpoints are saved, and read if there are any; None for none.
            checkpoint_every: training steps between checkpoints.
            progress: whether to show a progress bar on stderr.

        Raises:
            ValueError: numbers that do not fit together.
            Diverged: the loss is not finite.
        """
        self._check(batch_size, min_steps, max_steps)
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        training = _Training(
            nca=self.nca,
            optimizer=optax.chain(optax.normalize_by_update_norm(eps=1e-8), optax.adam(lr)),
            key=key_steps,
            seeds=self.nca.create_seed(self.nca.num_hidden_channels, shape=self.img_shape[:-1]),
            targets=jnp.asarray(self.dataset.get_batch(batch_size)[0]),
            pool_size=self.pool_size,
            n_damage=self.n_damage,
            num_steps=range(min_steps, max_steps),
        )
        self.state = self._take_steps(
            training,
            partial(training.start, key_init),
            num_epochs,
            log_dir=log_dir,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        return self.state

    def _take_steps(
        self,
        training: _Training,
        start: Callable[[], TrainState],
        num_epochs: int,
        *,
        log_dir: str | Path | None,
        checkpoint_dir: str | Path | None,
        checkpoint_every: int,
        progress: bool,
    ) -> train_state.TrainState:
        """Return the state after step `num_epochs`, or after the step in which a signal came.

        It goes on from the newest checkpoint, or else from what `start` returns.
        """
        from tqdm import tqdm

        from nca_models.training.checkpoints import Checkpoints
        from nca_models.training.trainer import stop_signals

        with ExitStack() as stack:
            checkpoints = restored = None
            if checkpoint_dir is not None:
                checkpoints = stack.enter_context(Checkpoints(Path(checkpoint_dir)))
                restored = checkpoints.restore(jax.eval_shape(start))
            state: TrainState = restored or jax.jit(start)()
            writer = None if log_dir is None else stack.enter_context(closing(_writer(log_dir)))
            step, first = jax.jit(training.step, donate_argnums=0), int(state.step)
            bar = tqdm(total=num_epochs, initial=first, unit="step", disable=not progress)
            stack.enter_context(bar)
            received = stack.enter_context(stop_signals())
            for done in range(first + 1, num_epochs + 1):
                state, metrics = step(state)
                self._report(bar, writer, done, metrics)
                last = bool(received) or done == num_epochs
                if checkpoints is not None and (last or done % checkpoint_every == 0):
                    checkpoints.save(done, state)
                if received:
                    bar.write(f"stopped after step {done}")
                    break
        return train_state.TrainState(
            state.step, self.nca.apply, state.params, training.optimizer, state.opt_state
        )

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
        """Write a training step to TensorBoard; the signature is that of jax-nca.

        Written are the loss, pictures `[batch, height, width, 3]` and, as scalars, `metrics`.
        """
        train_writer.add_scalar("loss", loss, i)
        pictures = {"batch": self.nca.to_rgb(batch), "outputs": outputs, "targets": targets}
        for name, images in pictures.items():
            train_writer.add_images(name, np.asarray(images), i, dataformats="NHWC")
        for name, value in (metrics or {}).items():
            train_writer.add_scalar(name, value, i)

    def _report(self, bar: Any, writer: Any, done: int, metrics: dict[str, Any]) -> None:
        """Show the loss of step `done`, counted from 1, and log it if there is a writer."""
        from nca_models.training.trainer import Diverged

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


@dataclass(frozen=True)
class _Training:
    """What a training of jax-nca computes, without what it reports.

    Attributes:
        key: of the training steps' random numbers.
        seeds: `[1, height, width, C]`, the state that the pool is filled with.
        targets: `[batch_size, height, width, 4]`.
        pool_size: samples in the pool.
        n_damage: how many samples of a batch are damaged.
        num_steps: from which the NCA's number of steps is drawn.
    """

    nca: Any
    optimizer: optax.GradientTransformation
    key: Array
    seeds: Any
    targets: Array
    pool_size: int
    n_damage: int
    num_steps: range

    def start(self, key: Array) -> TrainState:
        """Return the state before the first step; `key` is that of the parameters."""
        from nca_models.training.trainer import TrainState

        params = self.nca.init(key, self.seeds, key)["params"]
        pool = jnp.broadcast_to(self.seeds, (self.pool_size, *self.seeds.shape[1:]))
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, self.optimizer.init(params), pool)

    def step(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Take a training step; return the new state and what is reported of the step."""
        key = jax.random.fold_in(self.key, state.step)
        key_pool, key_damage, key_count, key_fire = jax.random.split(key, 4)
        num_steps = jax.random.randint(key_count, (), self.num_steps.start, self.num_steps.stop)
        indices, batch = pools.sample(state.pool, key_pool, len(self.targets))
        batch = batch.at[0].set(self.seeds[0])
        if self.n_damage:
            damaged = batch[-self.n_damage :]
            batch = batch.at[-self.n_damage :].set(circle(key_damage, damaged))

        def loss_fn(params: Any) -> tuple[Array, Array]:
            return self.loss(params, batch, key_fire, num_steps)

        (loss, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        pool = pools.update(state.pool, indices, outputs)
        metrics = {"loss": loss, "gradients": grads, "batch": batch, "outputs": outputs}
        return replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, pool=pool
        ), metrics

    def loss(self, params: Any, batch: Array, key: Array, num_steps: Array) -> tuple[Array, Array]:
        """Return the loss, and the states `[batch_size, height, width, C]` after `num_steps`.

        Every number of steps runs the same compiled loop, which is as long as the largest number.
        """
        nca, rule_params = self.nca, self.nca.rule_params(params)

        def one_step(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
            state, total = carry

            def advance(state: Array) -> tuple[Array, Array]:
                step_key = jax.random.fold_in(key, t)
                state = nk.step(nca.rule, rule_params, state, step_key, backend=nca.backend)
                error = jnp.mean(jnp.square(state[..., :4] - self.targets))
                return state, jnp.where(t >= num_steps - _LAST_STATES, error, 0.0)

            stay = lambda state: (state, jnp.zeros(()))
            state, error = jax.lax.cond(t < num_steps, advance, stay, state)
            return (state, total + error), None

        steps = jnp.arange(self.num_steps[-1])
        (state, total), _ = jax.lax.scan(one_step, (batch, jnp.zeros(())), steps)
        return total / jnp.minimum(num_steps, _LAST_STATES), state


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
