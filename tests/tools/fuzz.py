"""Compares values and gradients of random cases with the oracle; each seed is a case.

``python -m tests.tools.fuzz cpu --cases 10000 --json results.json`` shows progress, can be
interrupted, and goes on where it stopped; a failure names its seed. Without a GPU, its kernels run
in interpreters: ``TRITON_INTERPRET=1 python -m tests.tools.fuzz triton_interpreted``, and
``python -m tests.tools.fuzz pallas_interpreted``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.dispatch import Covers
from nca_kernels.files import write_json
from nca_kernels.rule import Alive, Rule
from nca_kernels.testing.cases import Arguments, Case
from nca_kernels.testing.compare import assert_close, tolerance
from nca_kernels.testing.conformance import ORACLE, cotangent_of
from tests.tools import pallas_host, triton_host

DRAWS = 4  # of arguments for each shape and rule


def random_case(seed: int, covers: Covers) -> Case:
    """The shape and rule of a seed: 1 to 3 dims, odd sizes, any taps, layers, inputs, dtype.

    The options are drawn from those in ``covers``, so that the same list gives the same cases.
    """
    random = np.random.default_rng(seed)

    def choose(*options: Any) -> Any:
        return options[random.integers(len(options))]

    def sizes(most: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(int(n) for n in random.integers(low, high + 1, random.integers(most + 1)))

    dims = int(random.integers(1, 4))
    channels = int(random.integers(1, 8)) if random.random() < 0.8 else choose(16, 17, 33)
    alive = Alive(int(random.integers(-1, 1)), choose(-0.2, 0.3, 0.9))
    rule = Rule(
        activation=choose(*covers.rule["activation"]),
        perception_activation=choose(*covers.rule["perception_activation"]),
        padding=choose(*covers.rule["padding"]),
        fire_rate=choose(0.1, 0.5, 0.9, 1.0),
        step_size=choose(-0.5, 0.0, 1.0, 3.0),
        alive=choose(None, alive, alive),
        precision="float32",
    )
    case = Case(
        name=f"random_{seed}",
        grid=tuple(int(n) for n in random.integers(1, (0, 40, 13, 6)[dims] + 1, dims)),
        rule=rule,
        batch=sizes(2, 1, 3),
        channels=channels,
        kernel=tuple(int(n) for n in random.integers(1, 5, dims)),
        filters=int(random.integers(1, 5)),
        dense=choose(None, None, int(random.integers(1, 20))),
        hidden=sizes(3, 1, 40),
        inputs=choose(0, 0, int(random.integers(1, 5))),
        inputs_per_sample=choose(True, False),
        bias=choose(True, False),
        perception_bias=choose(True, False),
        dtype=choose("float32", "float32", "float32", "bfloat16"),
        living=choose(0.1, 1.0),
    )
    if random.random() < 0.2:  # drawn last, so that the other cases stay what they were
        named = choose(("identity", "sobel"), ("von_neumann",), ("gradient", "laplacian", "mean"))
        case = replace(case, filters=named, kernel=(), dense=None)
    if random.random() < 0.1:  # so wide that tiles in its middle see no border
        case = replace(case, grid=(*case.grid[:-1], 5 * case.grid[-1]))
    return case


def check_random_case(backend: str, seed: int) -> bool:
    """Checks the case of a seed; returns False, for no verdict, if rounding decides who lives.

    ``DRAWS`` seeds in a row share a shape and a rule, since compiling takes most of the time; their
    weights, states and keys differ.

    Raises:
        AssertionError: naming the array that is off.
    """
    case = random_case(seed // DRAWS, dispatch.covers(backend))
    args = case.arguments(seed)
    expected, expected_grads, free = _compiled(case, ORACLE)(*args)
    if not _far_from_threshold(case, args, free):
        return False
    out, grads, _ = _compiled(case, backend)(*args)
    limit = tolerance(case.dtype, case.rule.precision)
    assert_close(out, expected, limit, f"seed {seed}: state")
    _assert_gradients_close(grads, expected_grads, limit, f"seed {seed}: gradient of ")
    return True


def _assert_gradients_close(grads: Any, expected: Any, limit: float, what: str) -> None:
    """The error of a gradient that cancels to nearly nothing is measured by the largest one."""
    size = max(float(np.linalg.norm(np.ravel(leaf))) for leaf in jax.tree.leaves(expected))
    for (path, got), want in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(expected), strict=True
    ):
        assert got.dtype == want.dtype, f"{what}{path}: {got.dtype} is not {want.dtype}"
        got, want = (np.asarray(a, np.float64) for a in (got, want))
        error = np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 5e-2 * size, 1e-30)
        assert error <= limit, f"{what}{jax.tree_util.keystr(path)}: error ratio {error:.3g}"


@lru_cache(maxsize=4)
def _compiled(case: Case, backend: str) -> Callable:
    """A jitted function: new state, gradients and, of the oracle, the new state if nothing died."""

    @jax.jit
    def run(params: Any, state: Any, key: Any, inputs: Any) -> tuple[Any, Any, Any]:
        def step(params: Any, state: Any, inputs: Any) -> Any:
            params = case.with_constant_taps(params)
            return nk.step(case.rule, params, state, key, inputs, backend=backend)

        out, pull = jax.vjp(step, params, state, inputs)
        grads = dict(zip(("params", "state", "inputs"), pull(cotangent_of(out)), strict=True))
        if backend != ORACLE:
            return out, grads, None
        free = replace(case.rule, alive=None)
        return out, grads, nk.step(free, params, state, key, inputs, backend=backend)

    return run


def _far_from_threshold(case: Case, args: Arguments, free: Any) -> bool:
    """Whether no alive value is so close to the threshold that its rounding matters."""
    alive = case.rule.alive
    if alive is None:
        return True
    values = np.stack([args.state, free]).astype(np.float64)[..., alive.channel]
    margin = 1e-4 if case.dtype == "float32" else 2e-2
    return bool(np.abs(values - alive.threshold).min(initial=1.0) > margin)


def main(argv: list[str] | None = None) -> int:
    """Runs seeds one after another and writes the results; the exit code is 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.fuzz", description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--cases", type=int, default=200, help="how many seeds (default 200)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument(
        "--instruction-set",
        metavar="NAME",
        help="for all cases on the backend cpu (default: the best for each)",
    )
    parser.add_argument("--json", type=Path, help="results; goes on where the file stops")
    args = parser.parse_args(argv)
    triton_host.register()
    pallas_host.register()
    try:
        dispatch.requested(args.backend)
    except (ValueError, nk.BackendUnavailable) as error:
        parser.error(str(error))
    if args.instruction_set is not None and args.backend != "cpu":
        parser.error(f"--instruction-set is of the backend cpu, and this is {args.backend}")
    with ExitStack() as stack:
        if args.instruction_set is not None:
            from nca_kernels.backends.cpu import library

            try:
                stack.enter_context(library.using(args.instruction_set))
            except ValueError as error:
                parser.error(str(error))
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    done = _read(args.json) or {
        "backend": args.backend,
        "instruction_set": args.instruction_set,
        "first": args.first,
        "seeds": 0,
        "no_verdict": 0,
        "failures": {},
    }
    for i in tqdm(range(done["seeds"], args.cases), initial=done["seeds"], total=args.cases):
        seed = done["first"] + i
        try:
            done["no_verdict"] += not check_random_case(args.backend, seed)
        except AssertionError as error:
            done["failures"][str(seed)] = str(error)
            tqdm.write(str(error), file=sys.stderr)
        done["seeds"] = i + 1
        if done["seeds"] % 50 == 0 or done["seeds"] == args.cases:
            jax.clear_caches()  # every case is compiled anew, so that nothing would be used again
            if args.json is not None:
                write_json(args.json, done)
    failures = len(done["failures"])
    print(f"{done['seeds']} cases, {done['no_verdict']} without verdict, {failures} failures")
    return 1 if failures else 0


def _read(path: Path | None) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path is not None and path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
