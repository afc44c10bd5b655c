"""The folder of a training run: what is in it, and how it is made, checked and read.

config.json      system, preset, target and every setting; written last, so a folder that has
                 it is complete
target.png ...   the system's data
log.csv          one row for each training step; see `nca_models.training.logging`
checkpoints/     see `nca_models.training.checkpoints`
*.png *.gif      pictures, written when training ends
"""

import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nca_models import systems
from nca_models._files import is_pipe, piped, write_text

CONFIG = "config.json"
_STARTING = ".starting"  # there from the first moment of a run until its config.json is


class RunError(ValueError):
    """The folder is not what the command needs; the message is one line."""


@dataclass(frozen=True)
class Request:
    """What a user asked for.

    No preset, no target and a setting that is not there mean "as before" when resuming. For a new
    run they mean `small`, the system's default and "as the preset".
    """

    system: str
    preset: str | None
    target: str | None
    settings: dict[str, Any]


def exists(folder: Path) -> bool:
    """Tell whether `folder` holds a run."""
    return (folder / CONFIG).is_file()


def interrupted(folder: Path) -> bool:
    """Tell whether a run in `folder` was killed before `create` was done, which can be repeated."""
    return (folder / _STARTING).exists() and not exists(folder)


def configured(request: Request) -> Any:
    """Return the settings of a new run.

    Raises:
        RunError: the system has no such setting, or a value is impossible.
    """
    preset = systems.load(request.system).PRESETS[request.preset or "small"]
    settings = request.settings
    if unknown := sorted(settings.keys() - {field.name for field in fields(preset)}):
        raise RunError(f"{request.system} has no setting {', '.join(unknown)}")
    try:
        return replace(preset, **settings)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error


def open_run(folder: Path, request: Request) -> systems.System:
    """Resume the run in `folder`, or start one there; the errors are those of the two."""
    return (resume if exists(folder) else create)(folder, request)


def create(folder: Path, request: Request) -> systems.System:
    """Start a run: write the system's data and then `config.json`.

    Raises:
        RunError: a setting is impossible.
        DataError: the target cannot be had.
    """
    module, config = systems.load(request.system), configured(request)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STARTING).touch()
    try:
        module.SystemClass.prepare(config, request.target, folder)
        target = _name_of(request.target)
        _write(folder, request.system, request.preset or "small", target, config)
    except (ValueError, OSError):  # nothing to learn from, or no room: leave no half of a run
        (folder / _STARTING).unlink()
        if made:
            shutil.rmtree(folder)
        raise
    (folder / _STARTING).unlink()
    system: systems.System = module.SystemClass(config, folder)
    return system


def resume(folder: Path, request: Request) -> systems.System:
    """Reopen a run. The number of training steps may grow; no other setting may change.

    Raises:
        RunError: a setting differs from the run's.
    """
    saved = _read(folder)
    named = {"preset": request.preset, "target": _name_of(request.target)}
    asked = {name: value for name, value in named.items() if value is not None}
    asked |= {"system": request.system, **request.settings}
    steps = request.settings.get("num_train_steps")
    if unknown := sorted(request.settings.keys() - saved["config"].keys()):
        raise RunError(f"{folder} is a run of {saved['system']}, without {', '.join(unknown)}")
    for name, value in asked.items():
        before = saved[name] if name in saved else saved["config"].get(name)
        if value != before and not (name == "num_train_steps" and value > before):
            raise RunError(
                f"{folder} was started with {name} {before}, not {value}: leave it out to resume, "
                "or choose another --out for a new run"
            )
    system = load(folder)
    if steps is not None and steps != system.config.num_train_steps:
        longer = replace(system.config, num_train_steps=steps)
        _write(folder, saved["system"], saved["preset"], saved["target"], longer)
        system = load(folder)
    return system


def require(folder: Path, system: str | None = None) -> dict[str, Any]:
    """Return the settings of the run in `folder`, by name; nothing heavy is imported.

    Raises:
        RunError: there is no run, it is not one of `system`, or `config.json` is not one.
    """
    saved = _read(folder)
    if system not in (None, saved["system"]):
        raise RunError(f"{folder} is a run of {saved['system']}, not of {system}")
    settings: dict[str, Any] = saved["config"]
    return settings


def load(folder: Path, backend: str | None = None, size: int | None = None) -> systems.System:
    """Return the system of the run in `folder`.

    It runs on `backend`, if that is given, and films are on a square grid of side `size`.

    Raises:
        RunError: there is no run, `config.json` is not one, or the size is impossible.
    """
    saved = _read(folder)
    module = systems.load(saved["system"])
    if saved["preset"] not in module.PRESETS:
        known = ", ".join(module.PRESETS)
        raise RunError(f"{folder / CONFIG}: preset {saved['preset']!r} is not one of {known}")
    config = module.Config(**saved["config"])
    if backend is not None:
        config = replace(config, backend=backend)
    if size is not None:
        try:
            config = module.SystemClass.resized(config, size)
        except ValueError as error:
            raise RunError(f"--size {size}: {error}") from error
    system: systems.System = module.SystemClass(config, folder)
    return system


def _name_of(target: str | None) -> str | None:
    """What `config.json` calls a target: a pipe by what comes out of it, as its path is reused."""
    if target is None or not is_pipe(Path(target)):
        return target
    return f"a pipe with SHA-256 {sha256(piped(Path(target))).hexdigest()}"


def _tupled(value: Any) -> Any:
    """JSON has no tuples; settings have no lists."""
    return tuple(value) if isinstance(value, list) else value


def _write(folder: Path, system: str, preset: str, target: str | None, config: Any) -> None:
    saved = {"system": system, "preset": preset, "target": target, "config": asdict(config)}
    write_text(folder / CONFIG, json.dumps(saved, indent=2, ensure_ascii=False) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    if not exists(folder):
        raise RunError(
            f"{folder} holds no run (no {CONFIG}): give the folder that `nca train --out` named"
        )
    try:
        saved: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        missing = {"system", "preset", "target", "config"} - saved.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise RunError(f"{folder / CONFIG} is not a run's settings ({error})") from error
    if missing:
        raise RunError(f"{folder / CONFIG} lacks {', '.join(sorted(missing))}")
    try:
        saved["config"] = _checked(saved)
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{folder / CONFIG}: {error}; use the version of nca-kernels that wrote the file, or "
            "correct it"
        ) from error
    return saved


def _checked(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in what was read, with tuples; a ValueError says what is wrong."""
    name, settings = saved["system"], saved["config"]
    if name not in systems.names():
        raise ValueError(f"there is no system {name!r}, only {', '.join(systems.names())}")
    for key, kinds in (("preset", str), ("target", str | None), ("config", dict)):
        if not isinstance(saved[key], kinds):
            raise ValueError(f"{key} cannot be {json.dumps(saved[key])[:40]}")
    config = systems.settings(name)
    declared = {each.name for each in fields(config)}
    if unknown := sorted(settings.keys() - declared):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}")
    if lacking := sorted(declared - settings.keys()):
        raise ValueError(f"it lacks the setting {', '.join(lacking)}")
    settings = {key: _tupled(value) for key, value in settings.items()}
    config(**settings)  # which refuses impossible values
    return settings
