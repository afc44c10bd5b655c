"""What one step of a neural cellular automaton computes, and the checks of its arguments.

A step is perception (a small stencil), an MLP per cell, a stochastic update and an alive mask
(Mordvintsev et al., "Growing Neural Cellular Automata", Distill, 2020). :class:`Rule` holds what
is fixed, :class:`RuleParams` what is learned; together they say what every backend computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.01),
    "identity": lambda x: x,
}
KEEPS = ("exact", "bfloat16", "host")  # how a rollout's states wait for the backward
PADDINGS = ("zeros", "circular", "replicate", "reflect")
ATTENTION_PADDINGS = ("zeros", "circular")
PRECISIONS = ("default", "float32", "tensorfloat32", "bfloat16")
STATE_DTYPES = ("float32", "bfloat16", "float64")

Layer = tuple[Any, Any]  # (W [in, out], b [out] or None)


@dataclass(frozen=True)
class Alive:
    """Alive masking: a cell lives while the largest alive value around it exceeds a threshold.

    Args:
        channel: index of the alive channel in the state; negative counts from the end.
        threshold: a cell is alive if the 3^d max-pool of the channel is greater than this.
    """

    channel: int = -1
    threshold: float = 0.1

    def __post_init__(self) -> None:
        _require_int("Alive.channel", self.channel)
        _require_real("Alive.threshold", self.threshold)


@dataclass(frozen=True)
class Rule:
    """What is fixed about a step. Hashable, so it can be a static argument of ``jax.jit``.

    Args:
        activation: after every hidden layer: relu, gelu (tanh form, as ``jax.nn.gelu``), silu,
            tanh, leaky_relu (slope 0.01) or identity.
        perception_activation: applied to the perception before the inputs join; the same names.
        padding: what lies outside the grid, for the perception and the alive pool: zeros (for
            the pool: nothing), circular, replicate (the edge cell) or reflect (without the edge).
        fire_rate: probability that a cell updates in a step, 0 < fire_rate <= 1.
        step_size: multiplies the update.
        alive: an :class:`Alive`, or None for no alive masking.
        precision: of the matrix products: default (what XLA does on the platform), float32,
            tensorfloat32 (where the hardware has it or gains from it, else float32) or bfloat16
            (operands rounded to bfloat16, accumulated in float32).

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    activation: str = "relu"
    perception_activation: str = "identity"
    padding: str = "zeros"
    fire_rate: float = 0.5
    step_size: float = 1.0
    alive: Alive | None = field(default_factory=Alive)
    precision: str = "default"

    def __post_init__(self) -> None:
        _require_choice("Rule.activation", self.activation, ACTIVATIONS)
        _require_choice("Rule.perception_activation", self.perception_activation, ACTIVATIONS)
        _require_choice("Rule.padding", self.padding, PADDINGS)
        _require_choice("Rule.precision", self.precision, PRECISIONS)
        _require_real("Rule.fire_rate", self.fire_rate)
        if not 0.0 < self.fire_rate <= 1.0:
            raise ValueError(
                f"Rule.fire_rate must be greater than 0 and at most 1, got {self.fire_rate!r}"
            )
        _require_real("Rule.step_size", self.step_size)
        if self.alive is not None and not isinstance(self.alive, Alive):
            raise TypeError(
                f"Rule.alive must be an Alive or None, got {type(self.alive).__name__}; "
                "write alive=nk.Alive(channel=-1, threshold=0.1)"
            )


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


class Operands(NamedTuple):
    """The arrays of one call as backends receive them: every one has a leading group axis.

    A group is one independent call: ``jax.vmap`` turns its axis into groups. ``G`` is the number
    of groups; the key and the weights may have a group axis of 1, shared by all groups.
    """

    state: Any  # [G, B, *S, C]
    fire: Any  # key data uint32 [G or 1, 2], or a mask bool [G or 1, B, *S], or None: all fire
    perception: Any  # [G, B, *S, P] when it is given (update), else None
    inputs: Any  # [G, B, *S, I] or [G, B, I] or None
    taps: Any  # [G or 1, *kernel, 1, F*C] or [G or 1, *kernel, C, P], None for update
    perception_bias: Any  # [G or 1, P] or None
    layers: tuple[Layer, ...]  # (W [G or 1, in, out], b [G or 1, out] or None)


class AttentionOperands(NamedTuple):
    """The arrays of one ``neighborhood_attention``, every one ``[G, B, *S, heads, d]``.

    The groups are those of :class:`Operands`; none of these arrays is shared by groups.
    """

    query: Any
    key: Any
    value: Any


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


# ---- checks: every one names the argument, what was given and what is allowed ----


def check_step(
    rule: Rule, params: RuleParams, state: Any, key: Any, inputs: Any
) -> tuple[int, ...]:
    """Checks the arguments of ``step``; returns the shape of the batch."""
    _require_type("rule", rule, Rule)
    _require_type("params", params, RuleParams)
    _require_array("params.perception", params.perception)
    num_spatial_dims = np.ndim(params.perception) - 2
    if num_spatial_dims not in (1, 2, 3):
        raise ValueError(
            "params.perception must be [*kernel, 1, F*C] or [*kernel, C, P] with a kernel of 1, 2 "
            f"or 3 spatial dims, got shape {np.shape(params.perception)}"
        )
    _check_state(state, num_spatial_dims, "params.perception has that many kernel axes")
    channels = np.shape(state)[-1]
    perception_size = _check_taps(params.perception, channels)
    _check_floating("params.perception", params.perception)
    _check_vector("params.perception_bias", params.perception_bias, perception_size)
    return _check_update_operands(
        rule, params.layers, state, perception_size, key, inputs, num_spatial_dims, "params.layers"
    )


def check_update(
    rule: Rule,
    layers: Any,
    state: Any,
    perception: Any,
    key: Any,
    inputs: Any,
    num_spatial_dims: int,
) -> tuple[int, ...]:
    """Checks the arguments of ``update``; returns the shape of the batch."""
    _require_type("rule", rule, Rule)
    _require_choice("num_spatial_dims", num_spatial_dims, (1, 2, 3))
    _check_state(state, num_spatial_dims, "pass num_spatial_dims for another grid")
    _require_array("perception", perception)
    _check_floating("perception", perception)
    if np.shape(perception)[:-1] != np.shape(state)[:-1]:
        raise ValueError(
            "perception must be [*batch, *spatial, P] with the batch and spatial shape of the "
            f"state, {np.shape(state)[:-1]}, got shape {np.shape(perception)}"
        )
    perception_size = np.shape(perception)[-1]
    return _check_update_operands(
        rule, layers, state, perception_size, key, inputs, num_spatial_dims, "layers"
    )


def check_rollout(
    num_steps: Any,
    checkpoint: Any,
    keep: Any,
    sample_steps: Any,
    return_states: Any,
    batch: tuple[int, ...],
) -> None:
    """Checks the arguments that ``rollout`` has beyond those of ``step``."""
    _require_int("num_steps", num_steps)
    if num_steps < 0:
        raise ValueError(f"num_steps must be at least 0, got {num_steps}")
    _require_type("return_states", return_states, bool)
    is_int = isinstance(checkpoint, int) and not isinstance(checkpoint, bool)
    if not (checkpoint in ("all", "sqrt") if isinstance(checkpoint, str) else is_int):
        raise ValueError(
            f"checkpoint must be 'all', 'sqrt' or an int (keep one state in n), got {checkpoint!r}"
        )
    if is_int and checkpoint < 1:
        raise ValueError(f"checkpoint must be at least 1 (keep one state in n), got {checkpoint}")
    _require_choice("keep", keep, KEEPS)
    if sample_steps is None:
        return
    _require_array("sample_steps", sample_steps)
    if return_states:
        raise ValueError(
            "sample_steps and return_states exclude each other: sampling exists to not keep the "
            "states; pass one of them"
        )
    if not jnp.issubdtype(_dtype(sample_steps), jnp.integer):
        raise TypeError(f"sample_steps must be integers, got {_dtype(sample_steps)}")
    if np.shape(sample_steps) != batch:
        raise ValueError(
            f"sample_steps must have the shape of the batch, {batch}, "
            f"got shape {np.shape(sample_steps)}"
        )
    if not isinstance(sample_steps, jax.core.Tracer) and np.size(sample_steps):
        given = np.asarray(sample_steps)
        low, high = int(given.min()), int(given.max())
        if low < 0 or high > num_steps:
            raise ValueError(
                f"sample_steps must be between 0 and num_steps={num_steps}, "
                f"got values from {low} to {high}"
            )


def check_attention(
    q: Any, k: Any, v: Any, radius: Any, num_spatial_dims: Any, padding: Any
) -> tuple[int, ...]:
    """Checks the arguments of ``neighborhood_attention``; returns the shape of the batch."""
    _require_choice("num_spatial_dims", num_spatial_dims, (1, 2, 3))
    _require_int("radius", radius)
    if radius < 0:
        raise ValueError(f"radius must be at least 0 (only the cell itself), got {radius}")
    _require_choice("padding", padding, ATTENTION_PADDINGS)
    for name, value in (("q", q), ("k", k), ("v", v)):
        _require_array(name, value)
        _check_state_dtype(name, value)
    shape = np.shape(q)
    if len(shape) < num_spatial_dims + 2:
        raise ValueError(
            f"q must be [*batch, *spatial, heads, d] with {num_spatial_dims} spatial dims (pass "
            f"num_spatial_dims for another grid), got shape {shape}"
        )
    batch_shape = shape[: len(shape) - num_spatial_dims - 2]
    if 0 in shape[len(batch_shape) :]:
        raise ValueError(
            f"q must have at least one cell, one head and a head size of at least 1, got shape "
            f"{shape}; only batch dims may be 0"
        )
    for name, value in (("k", k), ("v", v)):
        if np.shape(value) != shape:
            raise ValueError(
                f"{name} must have the shape of q, {shape}, got shape {np.shape(value)}"
            )
        if _dtype(value) != _dtype(q):
            raise TypeError(f"{name} must have the dtype of q, {_dtype(q)}, got {_dtype(value)}")
    return batch_shape


def _check_state(state: Any, num_spatial_dims: int, why: str) -> None:
    _require_array("state", state)
    _check_state_dtype("state", state)
    if np.ndim(state) < num_spatial_dims + 1:
        raise ValueError(
            f"state must be [*batch, *spatial, C] with {num_spatial_dims} spatial dims ({why}), "
            f"got shape {np.shape(state)}"
        )
    if 0 in np.shape(state)[np.ndim(state) - num_spatial_dims - 1 :]:
        raise ValueError(
            f"state must have at least one cell and one channel, got shape {np.shape(state)}; "
            "only batch dims may be 0"
        )


def _check_taps(taps: Any, channels: int) -> int:
    """Returns the perception's size."""
    *kernel, fan_in, size = np.shape(taps)
    if 0 in kernel or size == 0:
        raise ValueError(f"params.perception must not be empty, got shape {np.shape(taps)}")
    if fan_in not in (1, channels):
        raise ValueError(
            f"params.perception must be [*kernel, 1, F*C] or [*kernel, C, P] with C={channels} "
            f"channels (from the state), got shape {np.shape(taps)}"
        )
    if fan_in == 1 and size % channels:
        raise ValueError(
            f"depthwise params.perception must be [*kernel, 1, F*C], the last axis a multiple of "
            f"C={channels} (from the state), got shape {np.shape(taps)}"
        )
    return size


def _check_update_operands(
    rule: Rule,
    layers: Any,
    state: Any,
    perception_size: int,
    key: Any,
    inputs: Any,
    num_spatial_dims: int,
    name: str,
) -> tuple[int, ...]:
    """Checks what step and update share; returns the shape of the batch."""
    shape = np.shape(state)
    batch_shape = shape[: len(shape) - num_spatial_dims - 1]
    channels = shape[-1]
    if rule.alive is not None and not -channels <= rule.alive.channel < channels:
        raise ValueError(
            f"Rule.alive.channel must be between {-channels} and {channels - 1} for a state of "
            f"{channels} channels, got {rule.alive.channel}"
        )
    input_size = _check_inputs(inputs, shape, batch_shape)
    _check_layers(layers, perception_size, input_size, channels, name)
    _check_key(key)
    return batch_shape


def _check_inputs(inputs: Any, state_shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> int:
    """Returns the number of input channels."""
    if inputs is None:
        return 0
    _require_array("inputs", inputs)
    _check_floating("inputs", inputs)
    leading = np.shape(inputs)[:-1]
    if np.ndim(inputs) == 0 or leading not in (state_shape[:-1], batch_shape):
        raise ValueError(
            f"inputs must be per cell, {(*state_shape[:-1], 'I')}, or per sample, "
            f"{(*batch_shape, 'I')}, got shape {np.shape(inputs)}"
        )
    return np.shape(inputs)[-1]


def _check_layers(
    layers: Any, perception_size: int, input_size: int, channels: int, name: str
) -> None:
    if not isinstance(layers, (tuple, list)) or not layers:
        raise ValueError(f"{name} must be one or more (W, b) pairs, got {layers!r}")
    width, source = perception_size + input_size, f"perception {perception_size}"
    if input_size:
        source += f" + inputs {input_size}"
    for i, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 2:
            raise ValueError(f"{name}[{i}] must be a pair (W, b), with b None for no bias")
        weight, bias = layer
        _require_array(f"{name}[{i}][0]", weight)
        _check_floating(f"{name}[{i}][0]", weight)
        if np.ndim(weight) != 2 or np.shape(weight)[0] != width or np.shape(weight)[1] == 0:
            raise ValueError(
                f"{name}[{i}][0] must be [{width}, out] ({source}), got shape {np.shape(weight)}"
            )
        width, source = np.shape(weight)[1], f"the width of {name}[{i}]"
        _check_vector(f"{name}[{i}][1]", bias, width)
    if width != channels:
        raise ValueError(
            f"the last of {name} must have as many outputs as the state has channels, {channels}, "
            f"got {width}"
        )


def _check_key(key: Any) -> None:
    is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if is_typed and key.ndim == 0:
        return
    if is_typed:
        raise ValueError(
            f"key must be a single key, got an array of keys of shape {key.shape}; "
            "one key per sample is jax.vmap over state and key"
        )
    is_raw = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32
    if not (is_raw and key.ndim == 1):
        given = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(
            f"key must be a JAX random key, as jax.random.key(0) or jax.random.PRNGKey(0) give, "
            f"got {given}"
        )


def _check_vector(name: str, value: Any, size: int) -> None:
    if value is None:
        return
    _require_array(name, value)
    _check_floating(name, value)
    if np.shape(value) != (size,):
        raise ValueError(f"{name} must be [{size}] or None, got shape {np.shape(value)}")


def _check_floating(name: str, value: Any) -> None:
    if not jnp.issubdtype(_dtype(value), jnp.floating):
        raise TypeError(f"{name} must be floating point, got {_dtype(value)}")


def _check_state_dtype(name: str, value: Any) -> None:
    if _dtype(value).name not in STATE_DTYPES:
        raise TypeError(
            f"{name} must be float32 or bfloat16 (float64 under x64, on reference and xla), "
            f"got {_dtype(value)}"
        )


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype


def _require_array(name: str, value: Any) -> None:
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(value).__name__}")


def _require_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def _require_choice(name: str, value: Any, allowed: Any) -> None:
    if isinstance(value, bool) or value not in tuple(allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _require_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")


def _require_real(name: str, value: Any) -> None:
    """Python and NumPy real numbers only: arrays and tracers cannot be part of a static rule."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a Python float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
