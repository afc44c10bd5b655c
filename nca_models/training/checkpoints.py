"""Checkpoints through Orbax. Each is whole or absent, and only the last few are kept.

A checkpoint has two parts, `model` (the parameters) and `training` (optimizer, pool, step), so
that running a trained model need not read the pool. Leaves are stored flat, by their path in the
pytree, so that reading needs no class of the library that wrote them.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from nca_models._files import reason
from nca_models.run_folder import RunError

_PARTS = ("model", "training")


class NotSaved(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of a folder, a context manager."""

    def __init__(self, folder: Path, keep: int = 2, *, read_only: bool = False):
        """Open `folder`; unless `read_only`, make it and remove what a killed process left there.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=False,  # saved means on disk
        )
        self._folder = folder
        with _quiet():
            self._manager = ocp.CheckpointManager(
                folder.absolute(), options=options, item_names=_PARTS
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the folder; after an error, without waiting for processes that may be gone."""
        if kind is None or jax.process_count() == 1:
            self._manager.close()

    def latest(self) -> int | None:
        """Return the training step of the newest checkpoint, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: Any) -> None:
        """Save a `TrainState` after training step `step`; return when it is on disk.

        Raises:
            NotSaved: the disk is full, or the folder cannot be written to.
        """
        parts = {name: ocp.args.StandardSave(part) for name, part in _split(state).items()}
        before = self.latest()
        try:
            with _quiet():
                self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
        except Exception as error:  # Orbax raises what its threads and libraries do, of any class
            if jax.process_count() > 1:
                raise  # it may be that another process is gone
            whole = "there is none before" if before is None else f"that of step {before} is whole"
            text = f"the checkpoint of step {step} cannot be written ({reason(error)}); {whole}"
            raise NotSaved(getattr(error, "errno", None), text, str(self._folder)) from error

    def restore(self, template: Any) -> Any:
        """Return the newest `TrainState`, or None if there is none.

        Args:
            template: a `TrainState` of `jax.ShapeDtypeStruct`, with shardings or for one device.

        Raises:
            RunError: the checkpoint is damaged, or its shapes or names are not the template's.
        """
        return self._read(template, _PARTS)

    def restore_params(self, template: Any) -> Any:
        """Return the parameters of the newest checkpoint, or None; see `restore`."""
        state = self._read(template, ("model",))
        return None if state is None else state.params

    def _read(self, template: Any, names: Sequence[str]) -> Any:
        """The newest `TrainState`, as in `template` where it is in none of the parts `names`."""
        step = self.latest()
        if step is None:
            return None
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda leaf: leaf.update(sharding=leaf.sharding or device), template)
        parts = _split(placed)
        args = {name: ocp.args.StandardRestore(parts[name]) for name in names}
        try:
            with _quiet():
                restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # of any class, as in `save`
            if jax.process_count() > 1:
                raise
            raise RunError(self._damaged(step, error)) from error
        leaves = {path: leaf for name in names for path, leaf in restored[name].items()}
        return jax.tree.map_with_path(lambda path, leaf: leaves.get(_name(path), leaf), template)

    def _damaged(self, step: int, error: Exception) -> str:
        """Say what is wrong with a checkpoint, and what to do."""
        older = [other for other in self._manager.all_steps() if other < step]
        then = f"go on from step {max(older)}" if older else "train from the start"
        return (
            f"{self._folder / str(step)}: this checkpoint is damaged or does not fit the run's "
            f"settings ({reason(error)}); remove that folder to {then}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax and TensorStore in the block: what fails there is raised, and told in a line.

    If the block fails, it stays so, because their threads print more until the process ends.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    filters = warnings.catch_warnings()
    filters.__enter__()
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for logger in loggers:
        logger.disabled = True
    yield
    filters.__exit__(None, None, None)
    sys.unraisablehook = hook
    for logger, disabled in zip(loggers, before, strict=True):
        logger.disabled = disabled


def _split(state: Any) -> dict[str, dict[str, Any]]:
    """The leaves of a `TrainState` by part and path."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in _PARTS}
    for path, leaf in jax.tree.flatten_with_path(state)[0]:
        name = _name(path)
        parts["model" if name.startswith("params.") else "training"][name] = leaf
    return parts


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
