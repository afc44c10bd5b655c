"""Whether kernels run, and whether they are right: the stages smoke, paths and conformance."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.gpu import graphs
from benchmarks.gpu.items import Asked, Facts, Item
from nca_kernels import dispatch
from nca_kernels.testing import (
    ATTENTION,
    ATTENTION_CHECKS,
    CHECKS,
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    AttentionCase,
    Case,
    attention_conformance,
    covered_cases,
)
from nca_kernels.testing.compare import judged_by
from nca_kernels.testing.conformance import (
    check_fate_hangs_on_dead_neighbours,
    check_gradients_under_vmap,
    check_mask,
    check_mask_drawn_by_jax,
    check_update,
    check_values_and_gradients,
    value_and_gradients,
)

Check = Callable[[], object]
KERNEL = re.compile(r"\bnca_(?:triton|pallas)_([a-z_]*[a-z])")
TRANSFORMED = ("plane", "inputs_per_sample", "volume")
CASES = {case.name: case for case in CONFORMANCE}
ATTENTION_CASES = {case.name: case for case in ATTENTION}
# Together these take every branch of the kernels: one to three dims, all borders, dense, trained
# and constant taps, even and large kernels, with and without alive mask, inputs of cells and of
# samples, no hidden layer and several, states and products of all precisions, one tile and many.
PATHS = (
    "growing",
    "constant_taps_volume",
    "constant_taps_line",
    "many_blocks",
    "dense_circular_line",
    "volume_dense",
    "dense_replicate",
    "plane_replicate",
    "even_kernel_circular",
    "kernel_beyond_grid",
    "mostly_dead_circular",
    "no_hidden",
    "three_hidden",
    "inputs_per_cell",
    "inputs_per_sample",
    "bfloat16",
    "products_bfloat16",
)
ATTENTION_PATHS = ("circular", "volume", "three_heads", "bfloat16")


# ---- smoke: a launch of each kernel ----


def smoke(asked: Asked) -> list[Item]:
    items = [Item("machine", machine)]
    for backend in asked.backends:
        step = partial(_step_twice, backend, CASES["growing"])
        attention = partial(_attention_twice, backend, ATTENTION_CASES["plane"])
        items += [
            Item(f"step {backend}", partial(launched, step), _if_triton(backend, step)),
            Item(
                f"attention {backend}", partial(launched, attention), _if_triton(backend, attention)
            ),
        ]
        modes = ("forward", "training") if backend != "xla" else ("forward",)
        items += graphs.items(backend, CASES["growing"], modes)
    return items


def machine() -> Iterator[Facts]:
    """Facts of the driver, the device and the installed ptxas."""
    device = jax.devices()[0]
    yield {
        "kind": device.device_kind,
        "capability": getattr(device, "compute_capability", None),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": device.client.platform_version.strip(),
    }
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm"
    for name, command in {
        "nvidia-smi": ("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "ptxas": ("ptxas", "--version"),
        "ptxas of CUDA": ("/usr/local/cuda/bin/ptxas", "--version"),
    }.items():
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
            path = shutil.which(command[0])
            yield {name: f"{path}: {said.strip().splitlines()[-1] if said.strip() else 'silent'}"}


def launched(twice: Callable[[], tuple[str, list[jax.Array]]]) -> Iterator[Facts]:
    """The kernels that a call launches, called twice; fails unless its results are finite."""
    text, arrays = twice()
    yield {"kernels": sorted(set(KERNEL.findall(text)))}
    for array in arrays:
        assert jnp.isfinite(array.astype("float32")).all(), "not all are numbers"


def _step_twice(backend: str, case: Case) -> tuple[str, list[jax.Array]]:
    args = case.arguments()
    run = jax.jit(lambda: value_and_gradients(backend, case, args, calls=1))
    out = value_and_gradients(backend, case, args, calls=2)
    return run.lower().as_text(), jax.tree.leaves(out)


def _attention_twice(backend: str, case: AttentionCase) -> tuple[str, list[jax.Array]]:
    run = jax.jit(lambda: attention_conformance.value_and_gradients(backend, case, calls=1))
    out = attention_conformance.value_and_gradients(backend, case, calls=2)
    return run.lower().as_text(), jax.tree.leaves(out)


# ---- checks, with their numbers ----


def judged(check: Check) -> Iterator[Facts]:
    """Error ratios and limits of the arrays that a check compares, by name; then its failure."""
    ratios: dict[str, list[float | None]] = {}
    off: list[str] = []
    failure = None

    def judge(name: str, ratio: float, limit: float) -> None:
        ratios[name] = [float(f"{ratio:.3g}") if math.isfinite(ratio) else None, limit]
        if not ratio <= limit:
            off.append(f"{name}: error ratio {ratio:.3g} > {limit:.3g}")

    with judged_by(judge):
        try:
            check()
        except Exception as error:
            failure = error
    yield {"ratios": ratios}
    if failure:
        raise failure
    assert not off, "; ".join(off[:3])


def worst(check: Check) -> Iterator[Facts]:
    """As ``judged``, with the ratio of the array that is closest to its limit alone."""
    facts = judged(check)
    ratios = next(facts)["ratios"]
    if ratios:
        share = lambda name: (
            math.inf if ratios[name][0] is None else ratios[name][0] / ratios[name][1]
        )
        name = max(ratios, key=share)
        yield {"ratios": {name: ratios[name]}}
    yield from facts


def rehearse(check: Check) -> None:
    """Runs a check on a stand-in of a device, whose wrong results do not matter."""
    with judged_by(lambda *_: None), suppress(AssertionError):
        check()


def _if_triton(backend: str, check: Check) -> Check | None:
    return partial(rehearse, check) if backend == "triton" else None


def _item(name: str, backend: str, check: Check, run: Callable = judged) -> Item:
    return Item(f"{name} {backend}", partial(run, check), _if_triton(backend, check))


# ---- paths: every branch of the kernels ----


def paths(asked: Asked) -> list[Item]:
    items: list[Item] = []
    for backend in asked.backends:
        for name in PATHS:
            items.append(
                _item(name, backend, partial(check_values_and_gradients, backend, CASES[name]))
            )
        checks = {
            "smooth products of tensorfloat32": partial(
                check_values_and_gradients, backend, CASES["products_tensorfloat32"].smooth()
            ),
            "mask": partial(check_mask, backend, CASES["plane"]),
            "mask drawn by JAX": partial(check_mask_drawn_by_jax, backend, CASES["plane"]),
            "perception that is given": partial(check_update, backend, CASES["inputs_per_cell"]),
            "weights of their own": partial(check_gradients_under_vmap, backend, CASES["plane"]),
        }
        for name in ATTENTION_PATHS:
            check = ATTENTION_CHECKS["values_and_gradients"]
            checks[f"attention {name}"] = partial(check, backend, ATTENTION_CASES[name])
        items += [_item(name, backend, check) for name, check in checks.items()]
    return items[2::12] if asked.tiny else items


# ---- conformance: everything ----


def conformance(asked: Asked) -> list[Item]:
    items = [
        _item(name, backend, check, worst)
        for backend in asked.backends
        for name, check in conformance_checks(backend)
    ]
    return items[::150] if asked.tiny else items


def conformance_checks(backend: str) -> list[tuple[str, Check]]:
    """Every check of a backend on this machine, as (name, function)."""
    several = len(jax.devices()) > 1
    checks: list[tuple[str, Check]] = [
        (f"{name} {case}", partial(check, backend, case))
        for name, check in CHECKS.items()
        for case in CONFORMANCE
    ]
    for case in CONFORMANCE:
        if case.dtype == "float32" and case.rule.precision == "float32":
            rule = replace(case.smooth().rule, precision="tensorfloat32")
            at_tf32 = partial(check_values_and_gradients, backend, replace(case, rule=rule))
            checks.append((f"tensorfloat32 {case}", at_tf32))
    for case in covered_cases(dispatch.covers(backend)):
        checks.append((f"covered {case}", partial(check_values_and_gradients, backend, case)))
    checks.append(("fate", partial(check_fate_hangs_on_dead_neighbours, backend)))
    for name, check in TRANSFORMATION_CHECKS.items():
        if several or name != "shard_map":
            checks += [(f"{name} {c}", partial(check, backend, CASES[c])) for c in TRANSFORMED]
    for name, attention_check in ATTENTION_CHECKS.items():
        if several or name != "shard_map":
            cases = ATTENTION if name == "values_and_gradients" else ATTENTION[2:3]
            checks += [
                (f"attention {name} {c}", partial(attention_check, backend, c)) for c in cases
            ]
    return checks
