"""Launches: which one a call gets, and tuning, on an engine whose kernels only take time."""

import json
import time
from dataclasses import asdict, replace
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from nca_kernels import dispatch, tuning
from nca_kernels.rule import Operands
from nca_kernels.testing import CONFORMANCE
from nca_kernels.tiled import step, tuner
from nca_kernels.tiled.configuration import Engine, heuristic
from nca_kernels.tuning import Launch

CASE = next(case for case in CONFORMANCE if case.name == "plane")


class Kernels:
    """Names of kernels; the launch below knows how long each takes."""

    def __getattr__(self, name):
        return name


def sleeping_launch(kernel, inputs, outputs, grid, g, how, aliases=None):
    """Takes 20 ms, but 1 ms with 8 warps, and runs out of memory with 128 rows."""
    if how.rows == 128:
        raise RuntimeError("out of shared memory")

    def run(*arrays):
        time.sleep(0.001 if how.warps == 8 else 0.02)
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]

    return jax.pure_callback(run, list(outputs), *inputs)


ENGINE = Engine(
    name="sleeping",
    step_kernels=Kernels,
    attention_kernels=Kernels,
    launch=sleeping_launch,
    precision=lambda name, platform: "ieee",
    device=lambda: "Some GPU",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.setattr(tuner, "ROUNDS", 2)
    tuner._tuned.clear()
    tuning._read.cache_clear()
    jax.clear_caches()
    return tmp_path


def run_forward():
    name = "sleeping"
    forward = lambda call, platform, *args: step.forward(ENGINE, call, platform, *args)
    dispatch.register(dispatch.Backend(name, "for tests", lambda op: (forward, None)))
    args = CASE.arguments()
    nk.step(CASE.rule, args.params, args.state, args.key, backend=name)


def test_tuning_writes_the_fastest_that_runs(own_folder, monkeypatch):
    monkeypatch.setenv(tuning.TUNE, "1")
    run_forward()
    (written,) = json.loads((own_folder / "some-gpu.json").read_text())["step_forward"].items()
    assert "sleeping 2d float32 C5 taps 3x3x1x15" in written[0]
    assert written[1]["warps"] == 8
    assert tuning.winner("Some GPU", "step_forward", written[0]).warps == 8


def test_a_winner_is_used_and_the_users_goes_first(own_folder, monkeypatch):
    packaged = own_folder / "packaged"
    packaged.mkdir()
    monkeypatch.setattr(tuning, "PACKAGED", packaged)
    entry = {"step": {"problem": asdict(Launch(rows=16))}}
    (packaged / "some-gpu.json").write_text(json.dumps(entry))
    assert tuning.winner("Some GPU", "step", "problem") == Launch(rows=16)
    tuning.write_winner("Some GPU", "step", "problem", Launch(rows=128))
    assert tuning.winner("Some GPU", "step", "problem") == Launch(rows=128)
    assert tuning.winner("Some GPU", "step", "another") is None
    assert tuning.winner("Other GPU", "step", "problem") is None


def test_candidates_hold_the_heuristic_and_no_launch_twice():
    found = tuning.candidates(Launch())
    assert found[0] == Launch()
    assert len(found) == len(set(found))
    assert replace(Launch(), warps=8) in found


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 130, 300, 700])
@pytest.mark.parametrize("kernel", ["step_forward", "step_backward"])
def test_heuristic_is_made_of_powers_of_two(channels, kernel):
    """Of any widths, at any precision: blocks of other sizes do not compile."""
    for precise, wide in product((False, True), repeat=2):
        for hidden in (1, 100, 1000):
            case = replace(CASE, channels=channels, hidden=(hidden,))
            shapes = jax.eval_shape(lambda case=case: operands_of(case))
            how = heuristic(kernel, CALL, shapes, precise, wide)
            sizes = (*how.tile, how.rows, how.block_h, how.warps)
            assert all(n & (n - 1) == 0 for n in sizes), how
            assert min(how.tile[2], how.rows, how.block_h) >= 16


CALL = SimpleNamespace(num_spatial_dims=2)


def operands_of(case):
    params, state, _, _ = case.arguments()
    weights = jax.tree.map(lambda w: w[None], (params.perception, None, params.layers))
    return Operands(state[None], None, None, None, *weights)
