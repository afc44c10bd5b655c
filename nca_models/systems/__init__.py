"""The systems: one file each, found by its name.

A system's file holds three names: `Config`, its settings (a kind of `TrainConfig`, which also says
what the command line shows of the system), `PRESETS`, such settings by name ("small" for minutes on
a small machine, "medium" for up to an hour, "paper" as the original has it), and `SystemClass`, a
class that offers what `System` lists. The trainer and the command `nca` use nothing else, and
nothing outside the file names the system: adding a file adds a system. What several systems have in
common is in `nca_models.data` (the settings of what is learned), `nca_models.learning` and
`nca_models.modules`.

Imports nothing heavy, so that the command line can check names and settings before JAX starts.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from nca_models.training.config import TrainConfig

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import nnx

PRESET_NAMES = ("small", "medium", "paper")
_PARTS = ("Config", "PRESETS", "SystemClass")


class InvalidSystem(ValueError):
    """There is no such system, or its file is not one; the message is one line."""


class System(Protocol):
    """What the trainer and the command `nca` ask of a system.

    *Samples*, which the pool keeps, are a pytree of arrays with a leading axis of the batch, such
    as `{"state": [n, *spatial, C]}`. All functions of samples can be jitted. `nca train --estimate`
    needs a "state" in the samples, `num_steps` in the settings, and a model with a method `cost`.
    """

    config: TrainConfig
    measured: str  # what the values of `metrics` are
    measures: tuple[str, ...]  # names of what `swept` returns: columns of a sweep's table
    mapped: tuple[str, str]  # the measure that a sweep's heat map shows, and its unit

    def __init__(self, config: Any, folder: Path) -> None:
        """Read the data that `prepare` wrote to the run's folder."""

    @staticmethod
    def prepare(config: Any, target: str | None, folder: Path) -> None:
        """Write the data of a new run to `folder`: a target picture, digits, ...

        `target` names what to learn: a file, an emoji or a folder; None for the default.
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
        """Measure a trained model: values by name (a phrase); `measured` says what they are."""

    def swept(self, model: Any) -> tuple[float, ...]:
        """Return the `measures` of a model that a sweep trained."""

    def frames(
        self, model: Any, num_steps: int, *, every: int, damage: str, damage_at: int, seed: int
    ) -> Iterator[np.ndarray]:
        """Run from a fresh sample and yield frames, `[height, width, 3]` uint8.

        There is a frame before the first step, after each `every` steps and after the last step.
        """

    def film(self, model: Any, num_steps: int, **options: Any) -> np.ndarray:
        """Return all frames, `[frames, height, width, 3]`; see `nca_models.learning.SystemBase`."""

    @staticmethod
    def resized(config: Any, size: int) -> Any:
        """Return the settings for films on a square grid; a ValueError says if there are none."""

    def pictures(self, model: Any, folder: Path) -> list[Path]:
        """Write pictures of a trained model to `folder` and return their paths."""


def names(command: str | None = None) -> list[str]:
    """Return the sorted names of all systems, or of those that `command` takes."""
    every = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in every if command is None or command in settings(name).commands]


def load(name: str) -> Any:
    """Import the file of system `name` and return it as a module.

    Raises:
        InvalidSystem: there is no such file, or it lacks what a system's file defines.
    """
    path = _path(name)
    module = importlib.import_module(f"{__name__}.{name}")
    if missing := [part for part in _PARTS if not hasattr(module, part)]:
        raise InvalidSystem(f"{path}: a system's file must define {', '.join(missing)}")
    if missing := [preset for preset in PRESET_NAMES if preset not in module.PRESETS]:
        raise InvalidSystem(f"{path}: PRESETS lacks {', '.join(missing)}")
    return module


def settings(name: str) -> type[TrainConfig]:
    """Return the class `Config` of system `name`, if possible without importing JAX.

    Of the file, only the class and the statements that define the names it uses are executed.

    Raises:
        InvalidSystem: there is no such file, or it has no such class.
    """
    return _config(name, _path(name))


@cache
def _config(name: str, path: Path) -> type[TrainConfig]:
    module = ModuleType(f"{__name__}.{name}")
    try:
        part = _part(ast.parse(path.read_text(encoding="utf-8")), "Config")
        exec(compile(part, path, "exec", dont_inherit=True), vars(module))
    except NameError:  # the class needs a name that no plain statement of the module defines
        module = load(name)
    except Exception as error:
        raise InvalidSystem(f"{path}: its class Config cannot be read ({error})") from error
    config = getattr(module, "Config", None)
    if not (isinstance(config, type) and issubclass(config, TrainConfig)):
        raise InvalidSystem(f"{path}: a system's file must define Config, a kind of TrainConfig")
    return config


def _path(name: str) -> Path:
    spec = find_spec(f"{__name__}.{name}")
    if spec is None or spec.origin is None:
        raise InvalidSystem(f"{name}: no such system; there are {', '.join(names())}")
    return Path(spec.origin)


def _part(tree: ast.Module, name: str) -> ast.Module:
    """The statements of a module that define `name` and, in turn, the names that these use."""
    wanted, before = {name}, 0
    while len(wanted) > before:
        before = len(wanted)
        selected = [statement for statement in tree.body if wanted & set(_defined(statement))]
        used = (node for statement in selected for node in ast.walk(statement))
        wanted |= {node.id for node in used if isinstance(node, ast.Name)}
    return ast.Module(selected, type_ignores=[])


def _defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines there."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
