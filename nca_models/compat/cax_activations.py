"""Which activation of `nca_kernels.Rule` a function computes, told by its values and gradients.

A function's identity does not tell: copies and unpickled functions are other objects, and users
write activations of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class CannotFuse(Exception):
    """Why a part cannot be fused exactly."""


@dataclass(frozen=True)
class Activation:
    """An activation as `nca_kernels.Rule` has it; the slope is that of leaky_relu alone."""

    name: str = "identity"
    negative_slope: float | None = None

    def __str__(self) -> str:
        slope = self.negative_slope
        return self.name if slope is None else f"{self.name} of slope {slope:g}"


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "identity": lambda x: x,
    "leaky_relu": jax.nn.leaky_relu,
}
_MAGNITUDES = np.geomspace(1e-3, 1e3, 31)
# At 0 exactly, jax.nn.relu has gradient 0 and jnp.maximum(x, 0) has gradient 0.5. The mean of the
# numbers is not 0, so that a normalisation shows.
_NUMBERS = np.concatenate([-_MAGNITUDES, [0.0], 1.1 * _MAGNITUDES]).astype(np.float32)

_Result = tuple[np.ndarray, np.ndarray]  # values and gradients, of one shape


def recognise(function: Any, num_spatial_dims: int, features: int) -> Activation:
    """The activation that a function computes on arrays `[*spatial, features]`.

    It is evaluated at once, also while JAX traces.

    Raises:
        CannotFuse: it computes another one, is not element-wise, is random, has parameters, or
            depends on values that are only traced here.
    """
    label = _label(function)
    if _holds_parameters(function):
        raise CannotFuse(f"its activation {label} is or holds an nnx module or variable")
    shape = (len(_NUMBERS), *(1,) * (num_spatial_dims - 1), features)
    # Every feature gets every number, each cell a different one in each feature, so that what
    # mixes features or cells, or treats them differently, gives other results.
    index = np.add.outer(np.arange(len(_NUMBERS)), 5 * np.arange(features)) % len(_NUMBERS)
    state = _NUMBERS[index].reshape(shape)
    try:
        result, again = _evaluate(function, state), _evaluate(function, state)
    except Exception as error:
        raise CannotFuse(
            f"its activation {label} cannot be evaluated by itself: {type(error).__name__}"
        ) from error
    if not all(map(np.array_equal, result, again)):
        raise CannotFuse(f"its activation {label} is random")
    same_values = []
    for candidate in _candidates(result[0], state):
        values, gradients = (array[index].reshape(shape) for array in _expected(candidate))
        if _close(result[0], values):
            same_values.append(str(candidate))
            if _close(result[1], gradients):
                return candidate
    known = ", ".join(_FUNCTIONS)
    but = f"; it has the values of {same_values[0]}, but another gradient" if same_values else ""
    raise CannotFuse(f"its activation {label} is not one of {known}{but}")


def _label(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"partial({_label(function.func)})"
    return getattr(function, "__name__", None) or type(function).__name__


def _candidates(values: np.ndarray, numbers: np.ndarray) -> Iterator[Activation]:
    yield from (Activation(name) for name in _FUNCTIONS if name != "leaky_relu")
    at = np.unravel_index(np.argmin(np.abs(numbers + 1.0)), numbers.shape)  # of the number -1
    slope = float(values[at] / numbers[at])
    if np.isfinite(slope):
        yield Activation("leaky_relu", slope)


@functools.lru_cache(maxsize=64)
def _expected(activation: Activation) -> _Result:
    """Values and gradients of an activation at each of the numbers."""
    function = _FUNCTIONS[activation.name]
    if activation.negative_slope is not None:
        function = functools.partial(function, negative_slope=activation.negative_slope)
    return _evaluate(function, _NUMBERS)


def _evaluate(function: Callable[..., Any], numbers: np.ndarray) -> _Result:
    # The weights make a gradient tell which outputs it comes from. They are powers of two, so that
    # dividing by them is exact.
    weights = np.exp2(np.arange(numbers.size) % 3).reshape(numbers.shape).astype(np.float32)
    with jax.ensure_compile_time_eval():
        values, pull_back = jax.vjp(function, jnp.asarray(numbers))
        if values.shape != numbers.shape or values.dtype != jnp.float32:
            raise TypeError("it changes shape or dtype")
        (gradients,) = pull_back(jnp.asarray(weights))
    return np.asarray(values), np.asarray(gradients) / weights


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=1e-5, atol=2e-6)


def _holds_parameters(function: Any) -> bool:
    """Whether a function is, or refers to, a module, a variable or a random stream of nnx."""
    function = inspect.unwrap(function)
    if isinstance(function, functools.partial):
        inner = (function.func, *function.args, *function.keywords.values())
        return any(map(_holds_parameters, inner))
    bound = getattr(function, "__self__", None)
    inner = (function, bound)
    if inspect.isfunction(inspect.unwrap(getattr(function, "__func__", function))):
        names = inspect.getclosurevars(function)
        inner += (*names.nonlocals.values(), *names.globals.values())
    return any(isinstance(value, (nnx.Pytree, nnx.Variable)) for value in inner)
