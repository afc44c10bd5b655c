"""Which backend runs: one predicate, ``why_not``, chooses quietly and explains loudly.

A backend says what it covers, a call says what it is (:mod:`nca_kernels.call`), and a call that is
not covered is refused with a reason. A new option of ``Rule`` is therefore refused by every backend
that does not list it, unless it is at its default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import jax
import jax.export

ENVIRONMENT = "NCA_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend named by the caller cannot run the call: says why and what to do."""


class Kernels(NamedTuple):
    """The two functions of an op that a backend offers, on operands with a group axis."""

    forward: Callable[..., Sequence[Any]]  # (call, platform, operands) -> [value, *saved]
    backward: Callable[..., Sequence[Any]]
    # (call, platform, operands, saved, cotangent, wrt) -> the gradients that wrt asks for


EVERY = "every value that is allowed"
Values = Collection[Any] | str  # the values of a field that are covered, or EVERY


@dataclass(frozen=True)
class Covers:
    """The calls that a backend does right. Fields that are not listed must be at their defaults.

    Args:
        rule: by field of ``Rule``, the values; "Alive" stands for every ``Alive``.
        alive: by field of ``Alive``, the values.
        attention: by field of ``AttentionCall``, ``radius`` and ``padding``, the values.
        dtypes: of states, queries, keys and values.
        spatial_dims: how many axes a grid may have.
        symbolic_batch: whether ``jax.export`` may leave the number of samples open.
        width: why the widths of a call ``(call, avals)`` are too large, or None.
    """

    rule: Mapping[str, Values] = field(default_factory=dict)
    alive: Mapping[str, Values] = field(default_factory=dict)
    attention: Mapping[str, Values] = field(default_factory=dict)
    dtypes: Collection[str] = ("float32", "bfloat16")
    spatial_dims: Collection[int] = (1, 2, 3)
    symbolic_batch: bool = False
    width: Callable[[Any, Sequence[Any]], str | None] = field(default=lambda call, avals: None)

    def why_not(self, call: Any, avals: Sequence[Any]) -> str | None:
        """Why a call with such arrays is not among them, or None."""
        dtype, dims = avals[0].dtype.name, call.num_spatial_dims
        if dtype not in self.dtypes:
            return f"it takes {' or '.join(self.dtypes)}, and this is {dtype}: cast it"
        if dims not in self.spatial_dims:
            return f"it takes grids of {_any_of(self.spatial_dims)} axes, got {dims}"
        groups, samples, *sizes = avals[0].shape
        if any(map(jax.export.is_symbolic_dim, sizes)):
            return f"it takes grids of known size, and this is {sizes}"
        if not self.symbolic_batch and any(map(jax.export.is_symbolic_dim, (groups, samples))):
            return "it takes a known number of samples, and this one is symbolic"
        if rule := getattr(call, "rule", None):
            reason = _uncovered(rule, "Rule", self.rule)
            if reason is None and rule.alive is not None:
                reason = _uncovered(rule.alive, "Alive", self.alive)
        else:
            reason = _uncovered(call, "neighborhood_attention", self.attention, ATTENTION_FIELDS)
        return reason or self.width(call, avals)


ATTENTION_FIELDS = ("radius", "padding")


def _uncovered(
    options: Any, name: str, covered: Mapping[str, Values], only: Collection[str] = ()
) -> str | None:
    """The first field of ``options`` whose value is not covered, as a sentence, or None."""
    for option in fields(options):
        if only and option.name not in only:
            continue
        value = getattr(options, option.name)
        allowed = covered.get(option.name, (_default(option),))
        value = type(value).__name__ if is_dataclass(value) else value
        if allowed != EVERY and value not in allowed:
            return f"it does {name}.{option.name} {_any_of(allowed)} only, got {value!r}"
    return None


def _default(option: Field) -> Any:
    if option.default is not MISSING:
        return option.default
    return option.default_factory() if option.default_factory is not MISSING else MISSING


def _any_of(values: Values) -> str:
    return " or ".join(repr(value) for value in values)


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Args:
        name: what callers pass as ``backend=``.
        summary: one line for ``nca doctor``.
        load: imports the tool-chain and returns an op's :class:`Kernels` by its name, or the
            ordinary function if the backend is ``plain``.
        platforms: JAX platforms it runs on, None for every one.
        missing: why it cannot run in this process (a missing package, ...), or None.
        covers: the calls that it does right.
        markers: by op, what the lowered module of its gradient contains if the kernels run.
        custom_calls: the custom calls of its lowered modules, which ``jax.export`` must be told of.
        plain: whether it is ordinary JAX code, which JAX differentiates; "auto" passes it by.
    """

    name: str
    summary: str
    load: Callable[[str], Any]
    platforms: tuple[str, ...] | None = None
    missing: Callable[[], str | None] = field(default=lambda: None)
    covers: Covers = field(default_factory=Covers)
    markers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    custom_calls: tuple[str, ...] = ()
    plain: bool = False


class BackendStatus(NamedTuple):
    """One row of :func:`backends`."""

    name: str
    summary: str
    available: bool
    reason: str  # why it is not available; empty if it is
    auto: bool  # "auto" picks it here for an ordinary call


_registry: dict[str, Backend] = {}  # in the order of preference


def register(backend: Backend) -> None:
    """Adds a backend, after those already there in the order of preference."""
    _registry[backend.name] = backend


@contextmanager
def registered(*backends: Backend) -> Iterator[None]:
    """Within, ``backends`` are registered; afterwards the registry is what it was before."""
    before = dict(_registry)
    for backend in backends:
        register(backend)
    try:
        yield
    finally:
        _registry.clear()
        _registry.update(before)


def why_not(
    backend: Backend,
    platform: str | None = None,
    call: Any = None,
    avals: Sequence[Any] = (),
) -> str | None:
    """Why ``backend`` cannot run ``call`` on ``platform``, or None if it can."""
    if backend.platforms is not None and platform not in (None, *backend.platforms):
        return f"it runs on {' and '.join(backend.platforms)}, and this is {platform}"
    return backend.missing() or (backend.covers.why_not(call, avals) if call is not None else None)


def requested(backend: Any) -> str:
    """The name that a call asks for: its argument, else ``NCA_BACKEND``, else "auto".

    Raises:
        ValueError: for an unknown name.
        BackendUnavailable: for a known one that cannot run in this process.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(ENVIRONMENT):
        backend, source = os.environ[ENVIRONMENT], f"the environment variable {ENVIRONMENT}"
    if backend == "auto":
        return backend
    if not isinstance(backend, str) or backend not in _registry:
        names = ", ".join(["auto", *_registry])
        raise ValueError(f"{source} must be one of {names}, got {backend!r}")
    _require(_registry[backend])
    return backend


def plain(name: str, op: str) -> Callable | None:
    """The op as ordinary JAX code, if backend ``name`` is of that kind."""
    backend = _registry.get(name)
    return backend.load(op) if backend is not None and backend.plain else None


def markers(name: str, op: str) -> tuple[str, ...]:
    """What to look for in a lowered gradient of ``op`` to see that backend ``name`` ran."""
    return _registry[name].markers[op]


def covers(name: str) -> Covers:
    """The calls that backend ``name`` does right."""
    return _registry[name].covers


def export_checks() -> tuple[jax.export.DisabledSafetyCheck, ...]:
    """The checks of ``jax.export`` to switch off: those of the backends' custom calls."""
    names = dict.fromkeys(name for b in _registry.values() for name in b.custom_calls)
    return tuple(map(jax.export.DisabledSafetyCheck.custom_call, names))


def kernels(call: Any, avals: Sequence[Any], platform: str, name: str) -> Kernels:
    """The kernels that run ``call`` on ``platform``: those of ``name``, or the best for "auto".

    Raises:
        BackendUnavailable: a named backend never falls back.
    """
    if name != "auto":
        _require(_registry[name], platform, call, avals)
        return Kernels(*_registry[name].load(call.op))
    for backend in _registry.values():
        if not backend.plain and why_not(backend, platform, call, avals) is None:
            return Kernels(*backend.load(call.op))
    raise BackendUnavailable(f"no backend runs {call.op} on {platform}")


def backends() -> list[BackendStatus]:
    """Every backend: available here or why not, and which one "auto" picks.

    Example:
        ``for b in nk.backends(): print(b.name, b.available, b.reason, b.auto)``
    """
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    forced, rows, chosen = os.environ.get(ENVIRONMENT), [], False
    for backend in _registry.values():
        reason = why_not(backend, platform)
        auto = not (reason or backend.plain or chosen) if not forced else backend.name == forced
        chosen = chosen or auto
        rows.append(BackendStatus(backend.name, backend.summary, not reason, reason or "", auto))
    return rows


def _require(backend: Backend, *where: Any) -> None:
    reason = why_not(backend, *where)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {backend.name!r} cannot run here: {reason}; "
            "backend='auto' picks one that can, and nk.backends() lists them"
        )
