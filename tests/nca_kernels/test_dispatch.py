"""Which backend runs a call: what it covers, what a caller and the environment name."""

import re
from dataclasses import fields, replace

import jax
import pytest

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends import xla
from nca_kernels.rule import ACTIVATIONS, PADDINGS, PRECISIONS
from nca_kernels.testing import CONFORMANCE

PLANE = next(case for case in CONFORMANCE if case.name == "plane")


def test_xla_covers_all_options():
    """Other backends may refuse some; what xla refuses, "auto" could run nowhere."""
    listed = dispatch.covers("xla")
    assert set(listed.rule) == {field.name for field in fields(nk.Rule)}
    assert set(listed.alive) == {field.name for field in fields(nk.Alive)}
    assert set(listed.rule["activation"]) == set(ACTIVATIONS)
    assert set(listed.rule["perception_activation"]) == set(ACTIVATIONS)
    assert set(listed.rule["padding"]) == set(PADDINGS)
    assert set(listed.rule["precision"]) == set(PRECISIONS)


def step(backend="auto", rule=PLANE.rule):
    params, state, key, _ = PLANE.arguments()
    return nk.step(rule, params, state, key, backend=backend)


COVERED = dispatch.covers("xla")
NOT_LISTED = {
    "does Rule.padding 'zeros' only, got 'reflect'": (
        {"rule": {name: values for name, values in COVERED.rule.items() if name != "padding"}},
        {"padding": "reflect"},
    ),
    "activation 'relu' or 'tanh' only, got 'silu'": (
        {"rule": {**COVERED.rule, "activation": ("relu", "tanh")}},
        {"activation": "silu"},
    ),
    "does Alive.threshold 0.1 only, got 0.5": ({"alive": {"channel": dispatch.EVERY}}, {}),
    "takes bfloat16, and this is float32": ({"dtypes": ("bfloat16",)}, {}),
    "grids of 1 or 3 axes, got 2": ({"spatial_dims": (1, 3)}, {}),
}


@pytest.mark.parametrize("words", NOT_LISTED)
def test_what_is_not_listed_is_refused_by_name(words):
    """A field that a backend does not list may be at its default, and a value has to be listed."""
    listed, asked = NOT_LISTED[words]
    limited = dispatch.Backend(
        name="limited",
        summary="xla with fewer options",
        load=lambda op: getattr(xla, op),
        covers=replace(COVERED, **listed),
    )
    jax.clear_caches()  # what was lowered for another backend of this name
    with dispatch.registered(limited):
        with pytest.raises(nk.BackendUnavailable, match=re.escape(words)):
            step("limited", replace(PLANE.rule, **asked))
        if asked:
            step("limited")


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("NCA_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match="variable NCA_BACKEND must be one of auto, triton, pallas"
    ):
        step()
    monkeypatch.setenv("NCA_BACKEND", "reference")
    assert [b.name for b in nk.backends() if b.auto] == ["reference"]
    assert "stablehlo.convolution" in jax.jit(step).lower().as_text()


REFUSING = (
    (dispatch.Backend("elsewhere", "", None, platforms=("tpu",)), "runs on tpu, and this is cpu"),
    (dispatch.Backend("missing", "", None, missing=lambda: "no tool; install it"), "install it"),
    (
        dispatch.Backend("unable", "", None, covers=dispatch.Covers({"alive": (None,)})),
        "does Rule.alive None only, got 'Alive'",
    ),
)


def test_a_named_backend_never_falls_back():
    with dispatch.registered(*(backend for backend, _ in REFUSING)):
        for backend, reason in REFUSING:
            with pytest.raises(nk.BackendUnavailable, match=reason):
                step(backend.name)
        rows = {b.name: b for b in nk.backends()}
    assert not rows["missing"].available
    assert "install it" in rows["missing"].reason
    assert [r.auto for r in rows.values()].count(True) == 1


def test_registered_leaves_the_registry_as_it_was():
    names = [b.name for b in nk.backends()]
    with dispatch.registered(REFUSING[0][0]):
        assert [b.name for b in nk.backends()] == [*names, "elsewhere"]
    assert [b.name for b in nk.backends()] == names
