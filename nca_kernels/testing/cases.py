"""Named cases: one list of shapes, rules and dtypes for tests, tuning and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nca_kernels.dispatch import Covers, Values
from nca_kernels.perception import taps as depthwise_taps
from nca_kernels.rule import Alive, Rule, RuleParams


class Arguments(NamedTuple):
    """The arguments of ``nk.step`` after the rule."""

    params: RuleParams
    state: jax.Array
    key: jax.Array
    inputs: jax.Array | None


@dataclass(frozen=True)
class Case:
    """One configuration of a step.

    Args:
        name: unique; what reports and test ids show.
        grid: the spatial shape, 1 to 3 sizes.
        batch: the batch shape, which may be empty or have a 0.
        kernel: sizes of the taps; if empty, 3 on each axis.
        filters: filters per channel (depthwise random taps), or names of banks, whose taps are
            constant: a NumPy array, and not differentiated.
        dense: the number of outputs of dense random taps; None for depthwise taps.
        hidden: widths of the hidden layers, which may be none.
        inputs: the number of input channels; per cell, or per sample if ``inputs_per_sample``.
        bias, perception_bias: whether the layers, and the perception, have a bias.
        living: the fraction of the grid's first axis that is not 0.
    """

    name: str
    grid: tuple[int, ...]
    rule: Rule = field(default_factory=Rule)
    batch: tuple[int, ...] = (2,)
    channels: int = 5
    kernel: tuple[int, ...] = ()
    filters: int | tuple[str, ...] = 3
    dense: int | None = None
    hidden: tuple[int, ...] = (12,)
    inputs: int = 0
    inputs_per_sample: bool = False
    bias: bool = True
    perception_bias: bool = False
    dtype: str = "float32"
    living: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def perception_size(self) -> int:
        return self.taps_shape[-1]

    @property
    def taps_shape(self) -> tuple[int, ...]:
        if isinstance(self.filters, tuple):
            return depthwise_taps(self.filters, self.channels, len(self.grid)).shape
        kernel = self.kernel or (3,) * len(self.grid)
        if self.dense is not None:
            return (*kernel, self.channels, self.dense)
        return (*kernel, 1, self.filters * self.channels)

    @property
    def constant_taps(self) -> np.ndarray | None:
        """The taps of named filters."""
        if not isinstance(self.filters, tuple):
            return None
        return depthwise_taps(self.filters, self.channels, len(self.grid))

    def with_constant_taps(self, params: RuleParams) -> RuleParams:
        """``params``, which JAX may be tracing, with the constant taps in place of its own."""
        taps = self.constant_taps
        return params if taps is None else replace(params, perception=taps)

    def smooth(self) -> Case:
        """With SiLU for activations with a kink, where a small error makes gradients jump."""
        kinked = ("relu", "leaky_relu")
        names = ("activation", "perception_activation")
        changed: dict[str, Any] = {
            name: "silu" for name in names if getattr(self.rule, name) in kinked
        }
        return replace(self, rule=replace(self.rule, **changed))

    def arguments(self, seed: int = 0) -> Arguments:
        """Random arguments, the same for the same seed, scaled so that states stay of order one."""
        random = np.random.default_rng(seed)

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return np.asarray(random.normal(size=shape) * scale, np.float32)

        taps = self.constant_taps
        if taps is None:
            taps = normal(*self.taps_shape, scale=float(np.prod(self.taps_shape[:-1])) ** -0.5)
        widths = (self.perception_size + self.inputs, *self.hidden, self.channels)
        layers = tuple(
            (normal(n, m, scale=n**-0.5), normal(m, scale=0.1) if self.bias else None)
            for n, m in pairwise(widths)
        )
        bias = normal(self.perception_size, scale=0.1) if self.perception_bias else None
        state = normal(*self.batch, *self.grid, self.channels, scale=0.5)
        if self.living < 1:
            cut = max(round(self.grid[0] * self.living), 1)
            state[(slice(None),) * len(self.batch) + (slice(cut, None),)] = 0
        shape = self.batch if self.inputs_per_sample else (*self.batch, *self.grid)
        inputs = normal(*shape, self.inputs) if self.inputs else None
        params, inputs = jax.tree.map(jnp.asarray, (RuleParams(taps, bias, layers), inputs))
        params = self.with_constant_taps(params)
        cells = jnp.asarray(state.astype(jnp.dtype(self.dtype)))
        return Arguments(params, cells, jax.random.key(seed + 7), inputs)


@dataclass(frozen=True)
class AttentionCase:
    """One configuration of ``nk.neighborhood_attention``, whose arguments its fields are."""

    name: str
    grid: tuple[int, ...]
    batch: tuple[int, ...] = (2,)
    heads: int = 2
    head_size: int = 5
    radius: int = 1
    padding: str = "zeros"
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name

    def arguments(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random q, k and v ``[*batch, *grid, heads, d]``, the same for the same seed."""
        random = np.random.default_rng(seed)
        shape = (*self.batch, *self.grid, self.heads, self.head_size)
        q, k, v = (jnp.asarray(random.normal(size=shape), self.dtype) for _ in range(3))
        return q, k, v


def _rule(**changes: Any) -> Rule:
    return replace(Rule(alive=Alive(channel=1, threshold=0.5), precision="float32"), **changes)


CONFORMANCE = (
    Case("line", (11,), _rule()),
    Case("line_no_batch", (7,), _rule(alive=None), batch=()),
    Case("one_cell", (1,), _rule(alive=Alive(1, 0.0)), batch=(9,)),
    Case("plane", (7, 6), _rule()),
    Case("plane_batch_1", (5, 9), _rule(fire_rate=0.3), batch=(1,)),
    Case("plane_batch_0", (5, 9), _rule(), batch=(0,)),
    Case("plane_batch_2x3", (4, 5), _rule(), batch=(2, 3)),
    Case("one_wide", (1, 8), _rule(padding="reflect")),
    Case("one_high", (9, 1), _rule(padding="circular")),
    Case("one_cell_plane", (1, 1), _rule(padding="replicate"), batch=(9,)),
    Case("plane_circular", (5, 6), _rule(padding="circular")),
    Case("plane_replicate", (5, 6), _rule(padding="replicate"), kernel=(5, 3)),
    Case("plane_reflect", (5, 6), _rule(padding="reflect", alive=None), kernel=(3, 5)),
    Case("kernel_beyond_grid", (2, 3), _rule(padding="reflect"), kernel=(7, 5)),
    Case("kernel_beyond_grid_circular", (2, 3), _rule(padding="circular"), kernel=(5, 7)),
    # Grids so large that some tiles of 4x16 cells have all of their neighbours inside.
    Case("even_kernel", (12, 48), _rule(), kernel=(2, 4)),
    Case("even_kernel_circular", (11, 48), _rule(padding="circular"), kernel=(4, 2)),
    Case("kernel_1x1", (6, 5), _rule(), kernel=(1, 1)),
    Case("dense", (6, 5), _rule(), dense=7),
    Case("dense_replicate", (6, 5), _rule(padding="replicate"), dense=4, perception_bias=True),
    Case("dense_circular_line", (8,), _rule(padding="circular"), dense=6),
    Case("one_channel", (6, 7), _rule(alive=Alive(0, 0.3)), channels=1),
    Case("perception_bias", (6, 7), _rule(perception_activation="tanh"), perception_bias=True),
    Case("no_hidden", (6, 7), _rule(), hidden=()),
    Case("two_hidden", (6, 7), _rule(activation="gelu"), hidden=(9, 17)),
    Case("three_hidden", (6, 7), _rule(activation="silu"), hidden=(8, 5, 6), bias=False),
    Case("leaky_relu", (6, 7), _rule(activation="leaky_relu", step_size=0.25)),
    Case("linear", (6, 7), _rule(activation="identity"), bias=False),
    Case("tanh", (6, 7), _rule(activation="tanh", perception_activation="relu")),
    Case("always_fires", (6, 7), _rule(fire_rate=1.0)),
    Case("always_fires_no_alive", (6, 7), _rule(fire_rate=1.0, alive=None)),
    Case("rarely_fires", (6, 7), _rule(fire_rate=0.05)),
    Case("inputs_per_cell", (6, 7), _rule(perception_activation="silu"), inputs=3),
    Case("inputs_per_sample", (6, 7), _rule(), inputs=2, inputs_per_sample=True),
    Case("mostly_dead", (24, 9), _rule(step_size=4.0), living=0.1),
    Case("mostly_dead_circular", (24, 9), _rule(step_size=4.0, padding="circular"), living=0.1),
    Case("many_blocks", (96, 96), _rule(alive=None), hidden=(300,)),
    Case("bfloat16", (6, 7), _rule(), dtype="bfloat16"),
    Case("bfloat16_circular", (6, 7), _rule(padding="circular", alive=None), dtype="bfloat16"),
    Case("products_bfloat16", (6, 7), _rule(precision="bfloat16"), hidden=(32,)),
    Case("products_tensorfloat32", (6, 7), _rule(precision="tensorfloat32")),
    Case("products_default", (6, 7), _rule(precision="default")),
    Case("volume", (4, 5, 3), _rule()),
    Case("volume_circular", (3, 1, 4), _rule(padding="circular"), kernel=(3, 3, 2)),
    Case("volume_dense", (4, 3, 3), _rule(padding="reflect", alive=None), dense=6),
    Case("constant_taps_line", (23,), _rule(), filters=("identity", "gradient")),
    Case(
        "constant_taps_unused",
        (12, 48),
        _rule(padding="reflect", perception_activation="tanh"),
        filters=("von_neumann",),
    ),
    Case("constant_taps_volume", (9, 9, 33), _rule(), (1,), filters=("identity", "sobel")),
    Case("growing", (12, 48), filters=("identity", "sobel"), channels=16, hidden=(128,)),
)

# For fields that take every number: values other than the default.
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "fire_rate": (0.3,),
    "step_size": (0.25,),
    "channel": (0, -1),
    "threshold": (0.2,),
    "negative_slope": (0.2,),
    "radius": (2, 3),
}
# For fields that matter only together with a value of another field: that value.
TOGETHER: dict[str, dict[str, Any]] = {"negative_slope": {"activation": "leaky_relu"}}


def covered_cases(covers: Covers) -> list[Case]:
    """A small case for each value of each field that a backend says it covers.

    Raises:
        KeyError: a field takes every value, and ``EXAMPLES`` has no value for it.
    """
    rule = _rule()
    assert rule.alive is not None
    rules = [
        (f"{name}={value}", {name: value, **TOGETHER.get(name, {})})
        for name, value in _each(covers.rule)
    ]
    for name, value in _each(covers.alive):
        rules.append((f"alive_{name}={value}", {"alive": replace(rule.alive, **{name: value})}))
    cases = [Case(name, (9, 6), replace(rule, **change)) for name, change in rules]
    cases = [c if c.rule.precision == "float32" else c.smooth() for c in cases]
    cases += [Case(f"{dims}d", (5, 4, 6)[:dims], rule) for dims in covers.spatial_dims]
    dtypes = (dtype for dtype in covers.dtypes if dtype != "float64")  # which needs x64
    return cases + [Case(dtype, (9, 6), rule, dtype=dtype) for dtype in dtypes]


def _each(covered: Mapping[str, Values]) -> Iterator[tuple[str, Any]]:
    """(field, value) of all but ``Alive``, whose own fields have cases."""
    for name, values in covered.items():
        for value in EXAMPLES[name] if isinstance(values, str) else values:
            if value != "Alive":
                yield name, value


ATTENTION = (
    AttentionCase("line", (11,)),
    AttentionCase("line_radius_3", (9,), batch=(), radius=3),
    AttentionCase("plane", (7, 6)),
    AttentionCase("one_wide", (1, 8), radius=2),
    AttentionCase("one_cell", (1, 1)),
    AttentionCase("batch_0", (5, 4), batch=(0,)),
    AttentionCase("batch_2x3", (4, 5), batch=(2, 3)),
    AttentionCase("radius_0", (4, 5), radius=0),
    AttentionCase("radius_2", (7, 6), radius=2),
    AttentionCase("circular", (5, 6), padding="circular"),
    AttentionCase("circular_beyond_grid", (2, 3), radius=4, padding="circular"),
    AttentionCase("head_size_1", (6, 5), head_size=1),
    AttentionCase("three_heads", (6, 5), heads=3, head_size=16),
    AttentionCase("volume", (4, 5, 3)),
    AttentionCase("volume_circular", (3, 1, 4), padding="circular"),
    AttentionCase("bfloat16", (6, 7), dtype="bfloat16"),
)

BENCHMARKS = (
    Case(
        "growing",
        (72, 72),
        batch=(8,),
        channels=16,
        filters=("identity", "sobel"),
        hidden=(128,),
    ),
    Case(
        "diffusing",
        (72, 72),
        Rule(alive=None),
        batch=(8,),
        channels=64,
        filters=("identity", "sobel"),
        hidden=(256,),
    ),
    Case(
        "self_autoencoding",
        (28, 28, 42),
        batch=(1,),
        channels=16,
        filters=("identity", "sobel"),
        hidden=(256,),
    ),
)
