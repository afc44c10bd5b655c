"""Copies and transformations of accelerated systems: they stay fused, or say why not."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from abc import ABCMeta

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")

from cax.core.update import NCAUpdate
from flax import nnx
from jax import export

import nca_kernels as nk
from nca_kernels.testing import assert_close
from nca_models.compat.cax import accelerate, explain
from tests.nca_models.compat.cax_systems import System, arguments

pytestmark = pytest.mark.usefixtures("quick_to_compile")


class Gelu(System):
    """A system that pickle takes: it cannot pickle JAX's relu."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.update.activation_fn = nnx.gelu


class Meta(type(nnx.Module), ABCMeta):
    pass


class OddUpdate(NCAUpdate, metaclass=Meta):
    """An update whose class has a metaclass of its own."""


class Odd(Gelu):
    make_update = OddUpdate

    def new_update(self, perception_size, rngs):
        return OddUpdate(
            channel_size=self.channels,
            perception_size=perception_size,
            hidden_layer_sizes=(16,),
            cell_dropout_rate=0.5,
            rngs=rngs,
        )


def through(dump, load, of=lambda cs: cs, back=lambda copied: copied):
    return lambda cs: back(load(dump(of(cs))))


WAYS = {
    "deepcopy": copy.deepcopy,
    "clone": nnx.clone,
    "pickle": through(pickle.dumps, pickle.loads),
    "pickle of split": through(
        pickle.dumps, pickle.loads, nnx.split, lambda parts: nnx.merge(*parts)
    ),
}
try:
    import cloudpickle
except ImportError:
    pass
else:
    WAYS["cloudpickle"] = through(cloudpickle.dumps, cloudpickle.loads)
    WAYS["cloudpickle of split"] = through(
        cloudpickle.dumps, cloudpickle.loads, nnx.split, lambda parts: nnx.merge(*parts)
    )


def assert_fused(cs, capsys):
    capsys.readouterr()
    explain(cs, arguments(System)[0])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # a perceive, an update and its mask, and the backend
    assert all(": fused" in line for line in lines[:3]), lines


@pytest.mark.parametrize("system", [System, Gelu, Odd])
@pytest.mark.parametrize("way", WAYS)
def test_copies_are_fused(way, system, capsys):
    if system is System and way.startswith("pickle"):
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(nnx.relu)
        return
    make = lambda: system(rngs=nnx.Rngs(3))
    state = arguments(System)[0]
    fast, expected = accelerate(make(), "xla", strict=True), make()._step(state)
    before, after = WAYS[way](fast), accelerate(WAYS[way](make()), "xla", strict=True)
    for cs in (before, after):
        assert type(cs.update) is type(fast.update)
        assert_fused(cs, capsys)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert_close(cs._step(state), expected, 1e-5)
    assert accelerate(before, strict=True) is before


@pytest.mark.parametrize("dumps", [pickle.dumps, *([cloudpickle.dumps] if len(WAYS) > 4 else [])])
def test_unpickled_in_another_process(dumps, tmp_path):
    """Also its parts and its graph definition, and what is pickled there once more."""
    cs = accelerate(Gelu(rngs=nnx.Rngs(0)))
    (tmp_path / "system").write_bytes(dumps((cs, cs.perceive, nnx.graphdef(cs))))
    code = """
import pickle, sys
from nca_models.compat.cax import explain
from tests.nca_models.compat.cax_systems import System, arguments
cs, perceive, graph = pickle.load(open(sys.argv[1], "rb"))
explain(pickle.loads(pickle.dumps(cs)), arguments(System)[0])
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "system")],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert run.stdout.count(": fused") == 3, run.stdout + run.stderr


# ---- transformations ----


def in_nnx(transform):
    """Accelerates a system that the transformation passes in."""
    return transform(lambda cs, state: accelerate(cs)._step(state).sum())


TRANSFORMS = {
    "jit": nnx.jit,
    "remat": nnx.remat,
    "grad": nnx.grad,
    "jit in jit": lambda f: nnx.jit(lambda cs, state: nnx.jit(f)(cs, state)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_accelerate_on_what_nnx_passed_in(name):
    """It says what to do at once; a system that is accelerated already may be passed in."""
    run, state = in_nnx(TRANSFORMS[name]), arguments(System)[0]
    cs = System(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"on a System that was passed in: .* Call accelerate"):
        run(cs, state)
    assert type(cs.update) is NCAUpdate
    run(accelerate(cs), state)


def test_accelerate_where_jax_traces():
    state = arguments(System)[0]
    expected = System(rngs=nnx.Rngs(0))._step(state)
    graph, content = nnx.split(System(rngs=nnx.Rngs(0)))

    @jax.jit
    def merged(content, state):
        return accelerate(nnx.merge(graph, content), strict=True)._step(state)

    @nnx.jit
    def merged_inside(cs, state):
        return accelerate(nnx.merge(*nnx.split(cs)), strict=True)._step(state)

    @nnx.jit
    def created(state):
        return accelerate(System(rngs=nnx.Rngs(0)), strict=True)._step(state)

    assert_close(merged(content, state), expected, 1e-5)
    assert_close(merged_inside(System(rngs=nnx.Rngs(0)), state), expected, 1e-5)
    assert_close(created(state), expected, 1e-5)


def test_after_cached_partial():
    """It steps a copy, which is not accelerated afterwards; other copies are the user's."""
    step = nnx.jit(lambda cs, state: cs(state))
    cs, state = System(rngs=nnx.Rngs(0)), arguments(System)[0]
    cached = nnx.cached_partial(step, cs)
    cached(state)
    with pytest.warns(UserWarning, match="steps a copy of it, which is not accelerated") as caught:
        accelerate(cs)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(cs)  # nothing changes
        fresh = System(rngs=nnx.Rngs(0))
        copies = [nnx.clone(fresh), copy.deepcopy(fresh), nnx.merge(*nnx.split(fresh))]
        accelerate(fresh)
        cached_after = nnx.cached_partial(step, fresh)
        cached_after(state)
        del cached
        accelerate(cs, "xla")
    assert len(copies) == 3
    with pytest.warns(UserWarning, match="call accelerate"):
        accelerate(fresh, "xla")
    cached_after(state)


def test_a_numpy_state_changed_in_place():
    """The perception is that of the state before; with arrays of JAX this cannot happen."""

    class InPlace(System):
        def _step(self, state, input=None, *, sow=False):
            perception = jax.block_until_ready(self.perceive(state))
            if isinstance(state, np.ndarray):
                state *= 0.5
            return self.update(state, perception)

    state = np.asarray(arguments(System)[0])
    plain, fast = InPlace(rngs=nnx.Rngs(0)), accelerate(InPlace(rngs=nnx.Rngs(0)))
    assert_close(fast._step(state.copy()), plain._step(state.copy()), 1e-5)
    for cs in (plain, fast):  # the taps as well, as a restored checkpoint may hold them
        kernel = np.array(cs.perceive.conv.kernel[...])
        cs.perceive.conv.kernel.set_value(kernel)
    assert_close(fast._step(jnp.asarray(state)), plain._step(jnp.asarray(state)), 1e-5)


def test_disable_jit():
    state = arguments(System)[0]
    expected = System(rngs=nnx.Rngs(0))(state, num_steps=2)
    with jax.disable_jit():
        for backend in ("auto", "xla"):
            cs = accelerate(System(rngs=nnx.Rngs(0)), backend, strict=True)
            assert_close(cs(state, num_steps=2), expected, 1e-5)


def test_export_with_any_number_of_samples():
    """A program for other machines, with the checks turned off that JAX makes of custom calls."""
    cs = accelerate(System(rngs=nnx.Rngs(0)))
    cs.eval()
    graph, content = nnx.split(cs)
    run = jax.jit(lambda content, state: nnx.merge(graph, content)(state, num_steps=3))
    (batch,) = export.symbolic_shape("batch")
    state = arguments(System, batch=5)[0]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), content)
    exported = export.export(run, disabled_checks=nk.DISABLE_JAX_EXPORT_CHECKS)(
        shapes, jax.ShapeDtypeStruct((batch, *state.shape[1:]), state.dtype)
    )
    assert_close(exported.call(content, state), cs(state, num_steps=3), 1e-5)
    assert_close(exported.call(content, state[:2]), cs(state[:2], num_steps=3), 1e-5)
