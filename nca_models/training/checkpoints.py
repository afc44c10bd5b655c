"""Checkpoints through Orbax. Each is whole or absent, and only the last few are kept.

A checkpoint has two parts, `model` (the parameters) and `training` (optimizer, pool, step), so
that running a trained model need not read the pool. Leaves are stored flat, by their path in the
pytree, so that reading needs no class of the library that wrote them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_PARTS = ("model", "training")


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints of a folder, a context manager."""

    def __init__(self, folder: Path, keep: int = 2):
        """Open `folder`, made if absent, and remove what a killed process left unfinished."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,  # saved means on disk
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=_PARTS)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the folder; after an error, without waiting for processes that may be gone."""
        if kind is None or jax.process_count() == 1:
            self._manager.close()

    def latest(self) -> int | None:
        """Return the training step of the newest checkpoint, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: Any) -> None:
        """Save a `TrainState` after training step `step`; return when it is on disk."""
        parts = {name: ocp.args.StandardSave(part) for name, part in _split(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**parts), force=True)

    def restore(self, template: Any) -> Any:
        """Return the newest `TrainState`, or None if there is none.

        Args:
            template: a `TrainState` of `jax.ShapeDtypeStruct`, with shardings or for one device.

        Raises:
            ValueError: shapes or names in the checkpoint are not those of the template.
        """
        return self._read(template, _PARTS)

    def restore_params(self, template: Any) -> Any:
        """Return the parameters of the newest checkpoint, or None; see `restore`."""
        state = self._read(template, ("model",))
        return None if state is None else state.params

    def _read(self, template: Any, names: Sequence[str]) -> Any:
        """The newest `TrainState`, as in `template` where it is in none of the parts `names`."""
        if self.latest() is None:
            return None
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda leaf: leaf.update(sharding=leaf.sharding or device), template)
        parts = _split(placed)
        args = {name: ocp.args.StandardRestore(parts[name]) for name in names}
        restored = self._manager.restore(self.latest(), args=ocp.args.Composite(**args))
        leaves = {path: leaf for name in names for path, leaf in restored[name].items()}
        return jax.tree.map_with_path(lambda path, leaf: leaves.get(_name(path), leaf), template)


def _split(state: Any) -> dict[str, dict[str, Any]]:
    """The leaves of a `TrainState` by part and path."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in _PARTS}
    for path, leaf in jax.tree.flatten_with_path(state)[0]:
        name = _name(path)
        parts["model" if name.startswith("params.") else "training"][name] = leaf
    return parts


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
