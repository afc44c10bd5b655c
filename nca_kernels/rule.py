"""What one step of a neural cellular automaton computes.

A step is perception (a small stencil), an MLP per cell, a stochastic update and an alive mask
(Mordvintsev et al., "Growing Neural Cellular Automata", Distill, 2020). :class:`Rule` holds what
is fixed, :class:`RuleParams` what is learned; together they say what every backend computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "identity": lambda x: x,
}
PADDINGS = ("zeros", "circular", "replicate", "reflect")
PRECISIONS = ("default", "float32", "tensorfloat32", "bfloat16")

Layer = tuple[Any, Any]  # (W [in, out], b [out] or None)


def copies_cells(padding: str) -> bool:
    """Whether copies of cells lie outside the grid, and not nothing.

    The perception and the alive pool see the copies, and the backward adds their gradients to those
    of the cells.
    """
    return padding != "zeros"


def wraps(padding: str) -> bool:
    """Whether the last cell of an axis is the neighbour of its first."""
    return padding == "circular"


@dataclass(frozen=True)
class Alive:
    """Alive masking: a cell lives while the largest alive value around it exceeds a threshold.

    Args:
        channel: index of the alive channel in the state; negative counts from the end.
        threshold: a cell is alive if the max-pool of the channel around it is greater than this.
        radius: how many cells the pool reaches on every axis, at least 1: ``(2 * radius + 1)^d``.
    """

    channel: int = -1
    threshold: float = 0.1
    radius: int = 1

    def __post_init__(self) -> None:
        require_int("Alive.channel", self.channel)
        require_real("Alive.threshold", self.threshold)
        require_int("Alive.radius", self.radius)
        if self.radius < 1:
            raise ValueError(f"Alive.radius must be at least 1 (a 3^d pool), got {self.radius}")


@dataclass(frozen=True)
class Rule:
    """What is fixed about a step. Hashable, so it can be a static argument of ``jax.jit``.

    Args:
        activation: after every hidden layer: relu, gelu (tanh form, as ``jax.nn.gelu``), silu,
            tanh, elu (alpha 1), leaky_relu or identity.
        perception_activation: applied to the perception before the inputs join; the same names.
        padding: what lies outside the grid, for the perception and the alive pool: zeros (for
            the pool: nothing), circular, replicate (the edge cell) or reflect (without the edge).
        fire_rate: probability that a cell updates in a step, 0 < fire_rate <= 1. A Python float is
            the fast way. A JAX or NumPy array, scalar or ``[*batch]``, may be traced and changes
            without recompilation; a rule that holds one is not hashable.
        step_size: multiplies the update; a float or an array, as ``fire_rate``. An array is
            differentiable.
        alive: an :class:`Alive`, or None for no alive masking.
        precision: of the matrix products: default (what XLA does on the platform), float32,
            tensorfloat32 (float32 on hardware that lacks it or gains nothing from it) or bfloat16
            (operands are rounded to bfloat16, sums are float32).
        negative_slope: the slope of leaky_relu below 0.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    activation: str = "relu"
    perception_activation: str = "identity"
    padding: str = "zeros"
    fire_rate: Any = 0.5
    step_size: Any = 1.0
    alive: Alive | None = field(default_factory=Alive)
    precision: str = "default"
    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        require_choice("Rule.activation", self.activation, ACTIVATIONS)
        require_choice("Rule.perception_activation", self.perception_activation, ACTIVATIONS)
        require_choice("Rule.padding", self.padding, PADDINGS)
        require_choice("Rule.precision", self.precision, PRECISIONS)
        require_control("Rule.fire_rate", self.fire_rate)
        rates = () if isinstance(self.fire_rate, jax.core.Tracer) else np.ravel(self.fire_rate)
        if not all(0.0 < rate <= 1.0 for rate in rates):
            raise ValueError(
                f"Rule.fire_rate must be greater than 0 and at most 1, got {self.fire_rate!r}"
            )
        require_control("Rule.step_size", self.step_size)
        require_real("Rule.negative_slope", self.negative_slope)
        if self.alive is not None and not isinstance(self.alive, Alive):
            raise TypeError(
                f"Rule.alive must be an Alive or None, got {type(self.alive).__name__}; "
                "write alive=nk.Alive(channel=-1, threshold=0.1)"
            )


class Controls(NamedTuple):
    """Numbers of a rule that are arrays, scalar or ``[*batch]``; None for those that are static."""

    fire_rate: Any = None
    step_size: Any = None

    @classmethod
    def split(cls, rule: Rule) -> tuple[Rule, Controls]:
        """The rule with what is static, and its arrays."""
        values = {name: getattr(rule, name) for name in cls._fields}
        arrays = {n: v for n, v in values.items() if isinstance(v, (jax.Array, np.ndarray))}
        defaults: Any = {field.name: field.default for field in fields(Rule)}
        return replace(rule, **{name: defaults[name] for name in arrays}), cls(**arrays)

    def join(self, rule: Rule) -> Rule:
        """The rule that was split."""
        arrays: Any = {name: value for name, value in self._asdict().items() if value is not None}
        return replace(rule, **arrays)


def activation(rule: Rule, name: str) -> Callable[[Array], Array]:
    """The function of ``ACTIVATIONS`` with that name and the rule's parameters."""
    if name == "leaky_relu":
        return partial(jax.nn.leaky_relu, negative_slope=rule.negative_slope)
    return ACTIVATIONS[name]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RuleParams:
    """What is learned about a step: a pytree of arrays.

    Args:
        perception: the taps, ``[*kernel, 1, F*C]`` depthwise (output index ``c*F + f``, as Flax's
            grouped convolutions) or ``[*kernel, C, P]`` dense. The kernel has one axis for each
            spatial dim; even sizes are aligned as ``SAME``.
        perception_bias: ``[P]`` or None, added to the perception.
        layers: one or more ``(W [in, out], b [out] or None)``; the first takes the perception and
            the inputs, ``in = P + I``, the last one gives the update, ``out = C``.
    """

    perception: Any
    perception_bias: Any = None
    layers: Sequence[Layer] = ()


def compute_dtype(state_dtype: Any) -> np.dtype:
    """The dtype of the arithmetic inside a step: float64 for float64 states, else float32."""
    return np.dtype("float64") if np.dtype(state_dtype) == np.float64 else np.dtype("float32")


def dot(a: Array, b: Array, precision: str, contract: tuple[int, int] = (-1, 0)) -> Array:
    """``a [..., K] @ b [K, N]``: the one definition of what ``Rule.precision`` means.

    ``contract``: the axes of ``a`` and ``b`` to sum over, instead of the last and the first.
    """
    dims = (((contract[0] % a.ndim,), (contract[1] % b.ndim,)), ((), ()))
    if precision == "bfloat16":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    return lax.dot_general(a, b, dims, precision=lax_precision(precision))


def lax_precision(precision: str) -> lax.Precision | None:
    """``Rule.precision`` as XLA takes it; bfloat16 is reached by rounding the operands."""
    return {
        "default": None,
        "float32": lax.Precision.HIGHEST,
        "tensorfloat32": lax.Precision.HIGH,
        "bfloat16": None,
    }[precision]


# ---- checks of fields: every one names the field, what was given and what is allowed ----


def require_choice(name: str, value: Any, allowed: Any) -> None:
    if isinstance(value, bool) or value not in tuple(allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def require_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")


def require_control(name: str, value: Any) -> None:
    """A real number, or an array of them that may be traced."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        require_real(name, value)
    elif not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a float or an array of floats, got {value.dtype}")
    elif not isinstance(value, jax.core.Tracer) and not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got {value!r}")


def require_real(name: str, value: Any) -> None:
    """Python and NumPy real numbers only: arrays and tracers cannot be part of a static rule."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a Python float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
