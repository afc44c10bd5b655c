"""The checks of arguments that the public operations make, before anything is traced.

Every one names the argument, what was given and what is allowed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nca_kernels.rule import Controls, Rule, RuleParams, require_choice, require_int

KEEPS = ("exact", "bfloat16", "host")  # how a rollout's states wait for the backward
ATTENTION_PADDINGS = ("zeros", "circular")
STATE_DTYPES = ("float32", "bfloat16", "float64")


def check_step(
    rule: Rule, params: RuleParams, state: Any, key: Any, inputs: Any, *, num_steps: Any = None
) -> tuple[int, ...]:
    """Checks the arguments of ``step``; returns the shape of the batch.

    ``num_steps``: of a rollout, whose masks may take the place of the key for each step.
    """
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
    batch_shape = _check_rule(rule, state, num_spatial_dims)
    _check_key(key, np.shape(state)[:-1], num_steps)
    input_size = _check_inputs(inputs, np.shape(state), batch_shape)
    _check_layers("params.layers", params.layers, perception_size, input_size, channels)
    return batch_shape


def check_update(
    rule: Rule,
    layers: Any,
    state: Any,
    perception: Any,
    key: Any,
    inputs: Any,
    *,
    num_spatial_dims: int,
) -> tuple[int, ...]:
    """Checks the arguments of ``update``; returns the shape of the batch."""
    _require_type("rule", rule, Rule)
    require_choice("num_spatial_dims", num_spatial_dims, (1, 2, 3))
    _check_state(state, num_spatial_dims, "pass num_spatial_dims for another grid")
    _require_array("perception", perception)
    _check_floating("perception", perception)
    if np.shape(perception)[:-1] != np.shape(state)[:-1]:
        raise ValueError(
            "perception must be [*batch, *spatial, P] with the batch and spatial shape of the "
            f"state, {np.shape(state)[:-1]}, got shape {np.shape(perception)}"
        )
    batch_shape = _check_rule(rule, state, num_spatial_dims)
    _check_key(key, np.shape(state)[:-1])
    input_size = _check_inputs(inputs, np.shape(state), batch_shape)
    _check_layers("layers", layers, np.shape(perception)[-1], input_size, np.shape(state)[-1])
    return batch_shape


def check_num_steps(num_steps: Any, max_steps: Any = None) -> None:
    """Checks the number of steps: static, or an integer that may be traced and its bound."""
    if max_steps is None:
        if isinstance(num_steps, jax.core.Tracer):
            raise TypeError(
                "num_steps is traced here: pass max_steps, the most steps that it can be, to "
                "rollout, or make num_steps a Python int (static_argnums of jax.jit)"
            )
        require_int("num_steps", num_steps)
        if num_steps < 0:
            raise ValueError(f"num_steps must be at least 0, got {num_steps}")
        return
    require_int("max_steps", max_steps)
    if max_steps < 0:
        raise ValueError(f"max_steps must be at least 0, got {max_steps}")
    if np.shape(num_steps) != () or not jnp.issubdtype(_dtype(num_steps), jnp.integer):
        raise TypeError(f"num_steps must be one integer, got {num_steps!r}")
    if not isinstance(num_steps, jax.core.Tracer) and not 0 <= int(num_steps) <= max_steps:
        raise ValueError(
            f"num_steps must be between 0 and max_steps={max_steps}, got {int(num_steps)}"
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
    _require_type("return_states", return_states, bool)
    is_int = isinstance(checkpoint, int) and not isinstance(checkpoint, bool)
    if not (checkpoint in ("all", "sqrt") if isinstance(checkpoint, str) else is_int):
        raise ValueError(
            f"checkpoint must be 'all', 'sqrt' or an int (keep one state in n), got {checkpoint!r}"
        )
    if is_int and checkpoint < 1:
        raise ValueError(f"checkpoint must be at least 1 (keep one state in n), got {checkpoint}")
    require_choice("keep", keep, KEEPS)
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
    require_choice("num_spatial_dims", num_spatial_dims, (1, 2, 3))
    require_int("radius", radius)
    if radius < 0:
        raise ValueError(f"radius must be at least 0 (only the cell itself), got {radius}")
    require_choice("padding", padding, ATTENTION_PADDINGS)
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


def _check_rule(rule: Rule, state: Any, num_spatial_dims: int) -> tuple[int, ...]:
    """Checks the rule against the state; returns the shape of the batch."""
    shape = np.shape(state)
    batch_shape = shape[: len(shape) - num_spatial_dims - 1]
    channels = shape[-1]
    if rule.alive is not None and not -channels <= rule.alive.channel < channels:
        raise ValueError(
            f"Rule.alive.channel must be between {-channels} and {channels - 1} for a state of "
            f"{channels} channels, got {rule.alive.channel}"
        )
    for name, value in Controls.split(rule)[1]._asdict().items():
        if value is not None and np.shape(value) not in ((), batch_shape):
            raise ValueError(
                f"Rule.{name} must be a scalar or have the shape of the batch, {batch_shape}, "
                f"got shape {np.shape(value)}"
            )
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
    name: str, layers: Any, perception_size: int, input_size: int, channels: int
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


def _check_key(key: Any, cells: tuple[int, ...], num_steps: Any = None) -> None:
    """``cells``: ``[*batch, *spatial]`` of the mask that may take the place of the key."""
    if num_steps is not None and callable(key):
        mask = jax.eval_shape(key, jax.ShapeDtypeStruct((), jnp.int32))
        if getattr(mask, "shape", None) != cells or mask.dtype != jnp.bool_:
            raise ValueError(
                f"a function in place of the key must return bool {list(cells)}, the mask of a "
                f"step, got {mask}"
            )
        return
    if isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.bool_:
        wanted = cells if num_steps is None else (int(num_steps), *cells)
        if key.shape != wanted:
            axes = "[*batch, *spatial]" if num_steps is None else "[num_steps, *batch, *spatial]"
            raise ValueError(
                f"a mask in place of the key must be {axes}, {wanted} here, got shape {key.shape}"
            )
        return
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
            "key must be a JAX random key, as jax.random.key(0) or jax.random.PRNGKey(0) give, or "
            f"a mask of the cells that fire, bool {list(cells)}; got {given}"
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
