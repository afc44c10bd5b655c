"""One training loop for every system.

All randomness of training step t comes from `fold_in(key(seed), t)`, and everything else that a
step needs is in the checkpoint, so a run that was killed and resumed reaches the same bits as an
uninterrupted one.
"""

import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from nca_models.modules import NCA
from nca_models.run_folder import RunError
from nca_models.systems import System
from nca_models.training import diagnosis
from nca_models.training import pool as pools
from nca_models.training.checkpoints import Checkpoints
from nca_models.training.config import TrainConfig
from nca_models.training.estimate import refuse_if_too_large
from nca_models.training.logging import Log, log10
from nca_models.training.split import Split, local, means_a_lost_process


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training: `step` int32 scalar, and pytrees."""

    step: jax.Array
    params: Any
    opt_state: Any
    pool: Any


class Interrupted(Exception):
    """Training was stopped by a signal, after saving a checkpoint."""

    def __init__(self, signum: int, step: int):
        """Keep the signal's number and the step of the checkpoint."""
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}")
        self.signum = signum
        self.step = step


class Diverged(Exception):
    """The loss is no longer a finite number."""


class ProcessLost(Exception):
    """Another process of the training has ended, so that it cannot go on."""


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return Adam on a linear schedule, of gradients that are clipped or normalized.

    Normalized as in Growing NCA (Distill, 2020): each parameter's gradient on its own.
    """
    decay_steps = config.decay_steps or config.num_train_steps
    schedule = optax.linear_schedule(config.learning_rate, config.final_learning_rate, decay_steps)
    scaling: Any = optax.clip_by_global_norm(config.clip_norm)
    if config.gradients == "normalized":
        unit = lambda gradient: gradient / (jnp.linalg.norm(gradient) + 1e-8)
        scaling = optax.stateless(lambda gradients, _: jax.tree.map(unit, gradients))
    return optax.chain(scaling, optax.adam(schedule))


class Trainer:
    """A system's jitted training step and its initial state, on one device or split over several.

    Attributes:
        params: the parameters of a new model.
        step: jitted `(TrainState, *arguments) -> (TrainState, loss)`; it donates the state.
        arguments: what the step takes beside its state: `root_key`, of all random numbers.
    """

    def __init__(self, system: System, split: Split | None = None):
        """Build the model of `system` and compile nothing yet.

        Raises:
            RunError: `split`, but the system's steps cannot be split.
        """
        self.system = system
        self.systems: Sequence[System] = [system]
        self.split = split
        self.config = system.config
        self.optimizer = optimizer(self.config)
        self.root_key, self._pool_key = jax.random.split(jax.random.key(self.config.seed))
        self.step = jax.jit(self._step, donate_argnums=0)
        fresh = lambda key: system.fresh(key, system.config.pool_size)
        shardings = None
        if split is not None:
            shardings = split.pool_shardings(jax.eval_shape(fresh, self._pool_key))
            self.root_key, self._pool_key = split.everywhere((self.root_key, self._pool_key))
        self.arguments: tuple[Any, ...] = (self.root_key,)
        self._fresh_pool = jax.jit(fresh, out_shardings=shardings)
        model = system.model(nnx.Rngs(self.config.seed))
        if split is not None and not isinstance(model, NCA):
            raise RunError(f"{type(model).__name__} cannot be split over devices: leave out --mesh")
        parts: Any = nnx.split(model, nnx.Param, ...)
        self._graph, self.params, self._constants = parts

    def initial_state(self) -> TrainState:
        """Return the state before the first step: new weights and a pool of fresh samples."""
        weights = self._initial_weights()
        if self.split is not None:
            weights = self.split.everywhere(weights)
        pool = self._fresh_pool(self._pool_key) if self.config.pool_size else None
        return TrainState(*weights, pool)

    def _initial_weights(self) -> tuple[jax.Array, Any, Any]:
        # Copies: the training step donates its state's buffers, and these are needed again.
        params = jax.tree.map(jnp.copy, self.params)
        return jnp.zeros((), jnp.int32), params, self.optimizer.init(params)

    def abstract_state(self) -> TrainState:
        """Return shapes, dtypes and, where it is split, shardings of `initial_state`."""
        if (split := self.split) is None:
            state: TrainState = jax.eval_shape(self.initial_state)
            return state
        pool = jax.eval_shape(self._fresh_pool, self._pool_key) if self.config.pool_size else None
        step, params, opt_state = jax.eval_shape(self._initial_weights)
        state = TrainState(step, params, opt_state, pool)
        shardings = replace(
            jax.tree.map(lambda _: split.whole, state), pool=split.pool_shardings(pool)
        )
        return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)

    def compiled(self) -> Any:
        """Return `step`, compiled: callable, and with XLA's plan for its memory."""
        return self.step.lower(self.abstract_state(), *self.arguments).compile()

    def call(self, compiled: Any, state: TrainState) -> tuple[TrainState, jax.Array]:
        """Take a training step; `compiled` is what the method of that name returned."""
        new: tuple[TrainState, jax.Array] = compiled(state, *self.arguments)
        return new

    def compiled_pool(self) -> Any:
        """Return the function that makes the first pool, compiled; None if there is no pool."""
        if not self.config.pool_size:
            return None
        return self._fresh_pool.lower(self._pool_key).compile()

    def model(self, params: Any) -> Any:
        """Return the module with these parameters."""
        return nnx.merge(self._graph, params, self._constants)

    def _step(self, state: TrainState, root_key: jax.Array) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(root_key, state.step)
        key_batch, key_loss = jax.random.split(key)
        indices, batch = self._batch(state.pool, key_batch, self._restart_rate(state.step))
        if self.split is not None:
            batch = self.split.on_devices(batch)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            model = self.model(params)
            if self.split is not None:
                model.split_over(self.split.mesh, self.split.spec)
            return self.system.loss(model, batch, key_loss)

        (loss, batch), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        new_pool = None if state.pool is None else pools.update(state.pool, indices, batch)
        if self.split is not None:
            new_pool = self.split.in_pool(new_pool)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, new_pool), loss

    def _restart_rate(self, step: jax.Array) -> float | jax.Array:
        """Return the probability that a fresh sample replaces one of the worst."""
        first, last = self.config.restart_rate, self.config.final_restart_rate
        if last is None:
            return first
        begin = self.config.restarts_fall_after
        done = step / self.config.num_train_steps
        return first + (last - first) * jnp.clip((done - begin) / (1 - begin), 0, 1)

    def _batch(
        self, pool: Any, key: jax.Array, restart_rate: float | jax.Array
    ) -> tuple[jax.Array, Any]:
        """Draw a batch, worst samples first; replace these, perhaps, and damage the best."""
        n, damaged = self.config.batch_size, self.config.damaged_per_batch
        key_pool, key_fresh, key_damage = jax.random.split(key, 3)
        if pool is None:
            return jnp.arange(n), self.system.fresh(key_fresh, n)
        indices, batch = pools.sample(pool, key_pool, n)
        order = jnp.argsort(self.system.errors(batch), descending=True)
        indices, batch = indices[order], pools.take(batch, order)
        worst = jnp.arange(self.config.restarts_per_batch)
        fresh = self.system.fresh(key_fresh, len(worst))
        if isinstance(restart_rate, jax.Array) or restart_rate < 1:
            key_rate = jax.random.fold_in(key_fresh, 1)
            restarts = jax.random.bernoulli(key_rate, restart_rate, worst.shape)
            fresh = jax.tree.map(
                lambda new, old: jnp.where(restarts.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
                fresh,
                pools.take(batch, worst),
            )
        batch = pools.update(batch, worst, fresh)
        if damaged:
            best = jnp.arange(n - damaged, n)
            hurt = self.system.damage(key_damage, pools.take(batch, best))
            batch = pools.update(batch, best, hurt)
        return indices, batch


class Together(Trainer):
    """Several systems trained at once: a training step is a training step of each of them.

    The arrays of its state have a leading axis of the models, and its losses are `[models]`. The
    systems' settings differ in the seed only. What they learn may differ if it is all in their
    attribute `learned`, arrays of the same shapes.
    """

    def __init__(self, systems: Sequence[Any]):
        """Build the models and compile nothing yet."""
        super().__init__(systems[0])
        self.systems = systems
        self.members = [Trainer(system) for system in systems]
        learned = [getattr(system, "learned", None) for system in systems]
        self.arguments = (
            jnp.stack([member.root_key for member in self.members]),
            jax.tree.map(lambda *x: jnp.stack(x), *learned),
        )
        self.step = jax.jit(jax.vmap(self._member_step), donate_argnums=0)

    def _member_step(
        self, state: TrainState, root_key: jax.Array, learned: Any
    ) -> tuple[TrainState, jax.Array]:
        member, system = copy(self.members[0]), copy(self.members[0].system)
        vars(system)["learned"] = learned
        member.system = system
        return member._step(state, root_key)

    def initial_state(self) -> TrainState:
        """Return the members' initial states, stacked."""
        states = [member.initial_state() for member in self.members]
        stacked: TrainState = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return stacked


def train(
    system: System,
    folder: Path,
    *,
    tensorboard: bool = False,
    progress: bool = True,
    split: Split | None = None,
) -> Any:
    """Train until `system.config.num_train_steps`, from the newest checkpoint in `folder` if any.

    Args:
        system: what to train.
        folder: receives `log.csv`, `checkpoints/` and, with `tensorboard`, event files.
        tensorboard: whether to log to TensorBoard too (needs tensorboardX).
        progress: whether to show a progress bar on stderr.
        split: over which devices the training is split. If there are several processes, each calls
            this, with a folder that all of them see.

    Returns:
        The trained model, on one device.

    Raises:
        Interrupted: on SIGINT or SIGTERM, once the step is done and a checkpoint saved.
        Diverged: the loss is not finite.
        ProcessLost: another one of several processes has ended.
        TooLarge: the training does not fit into memory; nothing has run yet.
        RunError: a checkpoint or the log is damaged.
        OSError: the log or a checkpoint cannot be written; the checkpoints before it are whole.
    """
    trainer = Trainer(system, split)
    state = _train(trainer, folder, [folder], tensorboard=tensorboard, progress=progress)
    return trainer.model(local(state.params))


def train_together(systems: Sequence[Any], folder: Path, folders: Sequence[Path]) -> list[Any]:
    """Train systems whose arrays have the same shapes at once, by `jax.vmap` over their weights.

    Args:
        systems: what to train; they differ only in their seeds and in `learned`.
        folder: receives the common checkpoints during the training, and is removed afterwards.
        folders: the folder of each system, which ends up as `train` would leave it.

    Returns:
        The trained models.

    Raises:
        Interrupted, TooLarge: as `train`.
        Diverged: no loss is finite. If only some are not, their logs show it.
    """
    together = Together(systems)
    state = _train(together, folder, folders, tensorboard=False, progress=True)
    models = []
    for i, (member, member_folder) in enumerate(zip(together.members, folders, strict=True)):
        part: TrainState = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        with Checkpoints(member_folder / "checkpoints") as checkpoints:
            checkpoints.save(int(part.step), part)
        models.append(member.model(part.params))
    shutil.rmtree(folder)
    return models


def _train(
    trainer: Trainer,
    folder: Path,
    log_folders: Sequence[Path],
    *,
    tensorboard: bool,
    progress: bool,
) -> TrainState:
    """Train to the end, with the checkpoints in `folder` and a log in each of `log_folders`.

    A checkpoint is saved on schedule, on a signal and at the end.
    """
    try:
        compiled = trainer.compiled()
    except ValueError as error:  # a mesh that cannot hold the grid
        raise RunError(str(error)) from error
    refuse_if_too_large(compiled, trainer.compiled_pool())
    config, losses = trainer.config, []
    with Checkpoints(folder / "checkpoints") as checkpoints, _lost_process(), ExitStack() as stack:
        state = checkpoints.restore(trainer.abstract_state()) or trainer.initial_state()
        step, total = int(jnp.max(state.step)), config.num_train_steps
        if jax.process_index() > 0:  # one process writes and speaks
            log_folders, progress = [], False
        logs = [stack.enter_context(Log(f, step, tensorboard=tensorboard)) for f in log_folders]
        received = stack.enter_context(stop_signals())
        bar = stack.enter_context(
            tqdm(total=total, initial=step, desc="training", unit="step", disable=not progress)
        )
        while step < total:
            state, loss = trainer.call(compiled, state)
            step += 1
            losses.append(loss)
            stop = received[:1]  # read once: a signal may come at any time
            save = bool(stop) or step == total or step % config.checkpoint_every == 0
            if save or len(losses) == _LOG_EVERY:
                _record(trainer, logs, bar, step, losses)
                losses = []
            if save:
                _require_finite(state.params, len(trainer.systems), step)
                for log in logs:
                    log.flush()  # before the checkpoint, so that no checkpoint is ahead of its log
                checkpoints.save(step, state)
            if stop:
                raise Interrupted(stop[0], step)
    return state


@contextmanager
def _lost_process() -> Iterator[None]:
    """Raise `ProcessLost` for errors in the block that mean it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not means_a_lost_process(error):
            raise
        raise ProcessLost(str(error).splitlines()[0]) from error


def trained_model(system: System, folder: Path) -> Any:
    """Return the model of the newest checkpoint in `folder`.

    Raises:
        RunError: there is no checkpoint yet, or it is damaged.
    """
    trainer, params = Trainer(system), None
    if (folder / "checkpoints").is_dir():
        with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            params = checkpoints.restore_params(trainer.abstract_state())
    if params is None:
        raise RunError(f"{folder} has no checkpoint yet: let `nca train` run until it saves one")
    return trainer.model(params)


def _require_finite(params: Any, models: int, step: int) -> None:
    """Raise Diverged if no model's weights are all finite; they have a leading axis of several."""
    leaves = [np.asarray(leaf).reshape(models, -1) for leaf in jax.tree.leaves(local(params))]
    if not np.isfinite(np.concatenate(leaves, axis=1)).all(axis=1).any():
        raise Diverged(f"the weights are not finite after step {step}: try a lower learning rate")


_LOG_EVERY = 10  # steps between reads of the loss, which make the host wait for the device


def _record(
    trainer: Trainer, logs: Sequence[Log], bar: Any, step: int, losses: list[jax.Array]
) -> None:
    """Log the losses of the steps up to `step`, each a scalar or `[logs]`, and show them."""
    values = np.stack(jax.device_get(losses)).reshape(len(losses), -1)
    for i, row in enumerate(values, start=step - len(values) + 1):
        for log, system, value in zip(logs, trainer.systems, row, strict=False):
            log.write(i, float(value))
            if ailment := diagnosis.while_training(system, float(value), log.unmoved, i):
                tqdm.write(ailment.line, file=sys.stderr)
        if not np.isfinite(row).any():
            raise Diverged(f"the loss is {row[0]} at step {i}: try a lower learning rate")
    mean = float(values[np.isfinite(values)].mean())
    bar.set_postfix_str(f"loss {mean:.2e}, log10 {log10(mean):.2f}", refresh=False)
    bar.update(len(values))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one acts as it does by default."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        print("\nfinishing this step and saving; once more to stop at once", file=sys.stderr)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
