"""Launches: which one a call gets, and tuning, on an engine whose kernels only take time."""

import json
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from nca_kernels import dispatch, tuning
from nca_kernels.backends import COMMON
from nca_kernels.backends.triton import attention_calls, step_calls, tuner
from nca_kernels.backends.triton.configuration import Engine, heuristic, problem_name
from nca_kernels.backends.triton.step_configuration import StepConfiguration
from nca_kernels.call import Operands, Weights
from nca_kernels.testing import ATTENTION, CONFORMANCE
from nca_kernels.testing.attention_conformance import attention as attend
from nca_kernels.tuning import Launch

CASE = next(case for case in CONFORMANCE if case.name == "plane")
ATTENTION_CASE = next(case for case in ATTENTION if case.name == "plane")


class Kernels:
    """Names of kernels; the launch below knows how long each takes."""

    def __getattr__(self, name):
        return name


launched = []  # the launches of kernels, in turn


def sleeping_kernel(kernel, inputs, outputs, *, config, launch, **rest):
    """Takes 20 ms, but 1 ms with 8 warps, and runs out of memory with 64 rows."""
    launched.append(launch)
    if isinstance(config, StepConfiguration):
        assert not (config.perception.constant and config.wanted.taps), "nobody asks for it"
    if launch.rows == 64:
        raise RuntimeError("out of shared memory")

    def run(*arrays):
        time.sleep(0.001 if launch.warps == 8 else 0.02)
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]

    return jax.pure_callback(run, list(outputs), *inputs)


ENGINE = Engine(
    name="sleeping",
    step_kernels=Kernels,
    attention_kernels=Kernels,
    run_kernel=sleeping_kernel,
    precision=lambda name, platform: "ieee",
    device=lambda: "Some GPU",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.setattr(tuner, "ROUNDS", 2)
    # Enough to hold one that fails and the fastest.
    monkeypatch.setattr(tuner, "candidates", lambda *args: tuning.candidates(*args)[:7])
    tuner._tuned.clear()
    tuning._read.cache_clear()
    jax.clear_caches()
    return tmp_path


def register():
    """The backend "sleeping", whose kernels are those of the engine above."""

    def load(op):
        module = attention_calls if op == "neighborhood_attention" else step_calls
        return partial(module.forward, ENGINE), partial(module.backward, ENGINE)

    dispatch.register(dispatch.Backend("sleeping", "for tests", load, covers=COMMON))


def gradient_of_step(case=CASE):
    args = case.arguments()
    run = partial(nk.step, case.rule, args.params, key=args.key, backend="sleeping")
    jax.grad(lambda state: run(state).sum())(args.state)


def gradient_with_constant_taps():
    gradient_of_step(replace(CASE, filters=("identity", "sobel")))


def gradient_of_attention():
    run = attend("sleeping", ATTENTION_CASE)
    jax.grad(lambda *arrays: run(*arrays).sum())(*ATTENTION_CASE.arguments())


@pytest.mark.parametrize(
    ("run", "kernels", "problem"),
    [
        (gradient_of_step, "step", "sleeping 2d float32 C5 taps 3x3x1x15"),
        (gradient_with_constant_taps, "step", "sleeping 2d float32 C5 taps 3x3x1x15 constant"),
        (gradient_of_attention, "attention", "sleeping 2d float32 radius 1 heads 2 size 5"),
    ],
)
def test_tuning_writes_the_fastest_that_runs(own_folder, monkeypatch, run, kernels, problem):
    """Forward and backward, each on its own; afterwards both are looked up."""
    register()
    monkeypatch.setenv(tuning.TUNE, "1")
    run()
    content = json.loads((own_folder / "some-gpu.json").read_text())
    assert set(content) == {f"{kernels}_forward", f"{kernels}_backward"}
    for kernel, winners in content.items():
        ((name, launch),) = winners.items()
        assert problem in name
        assert launch["warps"] == 8
        assert tuning.winner("Some GPU", kernel, name).warps == 8
    monkeypatch.delenv(tuning.TUNE)
    jax.clear_caches()
    launched.clear()
    run()
    assert {launch.warps for launch in launched} == {8}


def test_what_was_tuned_is_not_tuned_again(own_folder, monkeypatch, caplog):
    """A program that was interrupted goes on with the next kernel."""
    register()
    monkeypatch.setenv(tuning.TUNE, "1")
    gradient_of_step()
    assert "tuning step_forward for sleeping 2d" in caplog.text  # it says so, as it takes long
    tuner._tuned.clear()
    path = own_folder / "some-gpu.json"
    content = json.loads(path.read_text())
    del content["step_backward"]
    path.write_text(json.dumps(content))
    tuning._read.cache_clear()
    jax.clear_caches()
    caplog.clear()
    gradient_of_step()
    assert "tuning step_backward" in caplog.text
    assert "tuning step_forward" not in caplog.text
    assert json.loads(path.read_text()).keys() == {"step_forward", "step_backward"}


def test_launches_are_timed_in_turn():
    """No launch may be favoured by the moment at which it is measured."""
    turns = []

    def prepare(name):
        def run():
            turns.append(name)
            time.sleep({"a": 0.06, "b": 0.006}[name])  # longer than the shortest round
            return jnp.zeros(())

        return run

    runs = {name: partial(prepare, name) for name in ("a", "b")}
    assert tuner.fastest({**runs, "fails": lambda: 1 / 0}) == "b"
    assert turns == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert tuner.fastest({"fails": lambda: 1 / 0}) is None


def test_problems_of_few_and_of_many_cells_differ():
    """They have different tiles, and so need winners of their own."""
    names = set()
    for side in (72, 300, 600, 1024, 2048):
        shapes = jax.eval_shape(lambda n=side: operands_of(replace(CASE, grid=(n, n), batch=(1,))))
        call = SimpleNamespace(
            num_spatial_dims=2, constant_taps=None, rule=SimpleNamespace(precision="default")
        )
        names.add(problem_name(call, shapes))
    assert {name.split()[-1] for name in names} == {"few", "default", "many"}
    assert len(names) == 3


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


def test_a_winner_of_another_version_is_told_by_its_file(own_folder):
    entry = {"step": {"problem": {**asdict(Launch()), "clusters": 2}}}
    (own_folder / "some-gpu.json").write_text(json.dumps(entry))
    with pytest.raises(
        ValueError, match=r"some-gpu.json has a launch with clusters; .* tune again"
    ):
        tuning.winner("Some GPU", "step", "problem")


def test_candidates_hold_the_heuristic_and_no_launch_twice():
    found = tuning.candidates(Launch())
    assert found[0] == Launch()
    assert len(found) == len(set(found))
    assert replace(Launch(), warps=8) in found
    few = tuning.candidates(Launch(), tuner.ATTENTION_FIELDS)
    assert few[0] == Launch()
    assert {launch.tile for launch in few} == {Launch().tile}


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 130, 300, 700])
@pytest.mark.parametrize("kernel", ["step_forward", "step_backward"])
def test_heuristic_is_made_of_powers_of_two(channels, kernel):
    """At any width and precision: blocks of other sizes do not compile."""
    for precise, capability in product((False, True), (0, 80, 89, 90, 120)):
        for hidden in (1, 100, 1000):
            case = replace(CASE, channels=channels, hidden=(hidden,))
            shapes = jax.eval_shape(lambda case=case: operands_of(case))
            launch = heuristic(kernel, CALL, shapes, precise, capability)
            sizes = (*launch.tile, launch.rows, launch.block_h, launch.warps)
            assert all(n & (n - 1) == 0 for n in sizes), launch
            assert min(launch.tile[2], launch.rows, launch.block_h) >= 16


CALL = SimpleNamespace(num_spatial_dims=2)


def operands_of(case):
    params, state, _, _ = case.arguments()
    weights = Weights(params.perception, None, params.layers)
    return Operands(state[None], None, None, None, jax.tree.map(lambda w: w[None], weights))
