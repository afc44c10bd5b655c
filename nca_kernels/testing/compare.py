"""Comparison by error ratio, with one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

# The largest norm(out - ref) / norm(ref) of an array, by the dtype that limits its precision.
TOLERANCES = {
    "float64": 1e-12,
    "float32": 1e-5,
    "tensorfloat32": 2e-3,
    "bfloat16": 1e-2,
}


def tolerance(dtype: Any, precision: str = "float32") -> float:
    """The larger of the tolerances of the state's dtype and of the products' precision."""
    name = np.dtype(dtype).name
    if precision == "default":
        precision = "float32" if jax.default_backend() == "cpu" else "tensorfloat32"
    return max(TOLERANCES[name], 0.0 if name == "float64" else TOLERANCES[precision])


def error_ratio(out: Any, ref: Any) -> float:
    """``norm(out - ref) / norm(ref)`` in float64; infinite for another shape, dtype or NaN."""
    if np.shape(out) != np.shape(ref) or out.dtype != ref.dtype:
        return float("inf")
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    if not np.isfinite(out).all():
        return float("inf")
    error, size = np.linalg.norm((out - ref).ravel()), np.linalg.norm(ref.ravel())
    return float(error / size) if size else float(error)


Judge = Callable[[str, float, float], None]  # an array's name, its error ratio, the limit
_judges: list[Judge] = []


@contextmanager
def judged_by(judge: Judge) -> Iterator[None]:
    """Within, ``assert_close`` calls ``judge`` for every array, and raises nothing itself."""
    _judges.append(judge)
    try:
        yield
    finally:
        _judges.pop()


def assert_close(out: Any, ref: Any, limit: float, what: str = "") -> None:
    """Asserts the error ratio of every leaf of two pytrees, naming the leaf that is off."""
    out_leaves, out_tree = jax.tree_util.tree_flatten_with_path(out)
    ref_leaves, ref_tree = jax.tree_util.tree_flatten_with_path(ref)
    assert str(out_tree) == str(ref_tree), f"{what}: {out_tree} is not {ref_tree}"
    for (path, a), (_, b) in zip(out_leaves, ref_leaves, strict=True):
        ratio = error_ratio(a, b)
        name = f"{what}{jax.tree_util.keystr(path)}"
        if _judges:
            _judges[-1](name, ratio, limit)
            continue
        assert ratio <= limit, (
            f"{name}: error ratio {ratio:.3g} > {limit:.3g} "
            f"(shape {np.shape(a)} {a.dtype} against {np.shape(b)} {b.dtype})"
        )


def assert_same_bits(out: Any, ref: Any, what: str = "") -> None:
    """Asserts that two pytrees hold the same bits."""
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(ref), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{what}: bits differ"
