"""What every backend must pass: one class for ``nk.step``, one for ``nk.neighborhood_attention``.

A backend's test file inherits both, and says what is particular to it: the backend's name, which
of the cases it runs, and how. The checks themselves are those of :mod:`nca_kernels.testing`.
"""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import ClassVar

import jax
import pytest

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.testing import (
    ATTENTION,
    ATTENTION_CHECKS,
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    conformance,
    covered_cases,
)
from nca_kernels.testing.attention_conformance import (
    check_logits_far_from_zero,
    check_nan_spreads,
)
from nca_kernels.testing.cases import AttentionCase

CASES = {case.name: case for case in CONFORMANCE}
ATTENTION_CASES = {case.name: case for case in ATTENTION}


def pairs(checks, names, without=()):
    """(check, name of a case) for the transformations of a suite, each check on each case."""
    return tuple(product((check for check in checks if check not in without), names))


def computed_or_refused(backend):
    """A context in which a call in float64 has to raise if ``backend`` does not list that dtype."""
    if "float64" in dispatch.covers(backend).dtypes:
        return nullcontext()
    return pytest.raises(nk.BackendUnavailable, match=r"float32 or bfloat16.*cast it")


class Suite:
    """Parametrizes the tests of a class by the class's own attributes."""

    backend: ClassVar[str]

    def parameters(self):
        """The values of tests' arguments, by the name of the argument."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        for name, values in self.parameters().items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=_identifier)

    @pytest.fixture
    def kernels(self):
        """Overridden with parameters where a backend has several kernels for one call.

        The tests that take it run with each of them, the others with those that the backend
        chooses.
        """


def _identifier(value):
    return "-".join(value) if isinstance(value, tuple) else str(value)


class StepSuite(Suite):
    """Values, gradients, masks, refusals and transformations of a step.

    Attributes:
        backend: its name.
        cases: the cases whose values and gradients are compared with the oracle's.
        covered: a case for each value that the backend lists; by default all of them.
        calls: how often values and gradients are computed: 2 compares their bits.
        masks: names of the cases whose fire masks are compared with JAX's draw.
        activations: those that must not hide NaN; by default all that the backend lists.
        transformations: (name in ``TRANSFORMATION_CHECKS``, name of a case).
    """

    cases = CONFORMANCE
    covered = None
    calls = 2
    masks = ("line", "one_cell", "plane_batch_2x3", "rarely_fires", "always_fires", "volume")
    activations = None
    transformations = pairs(TRANSFORMATION_CHECKS, ("plane", "inputs_per_sample"))

    def parameters(self):
        covers = dispatch.covers(self.backend)
        return {
            "case": self.cases,
            "covered_case": covered_cases(covers) if self.covered is None else self.covered,
            "mask": self.masks,
            "activation": self.activations or covers.rule["activation"],
            "transformation": self.transformations,
        }

    def test_values_and_gradients(self, case):
        conformance.check_values_and_gradients(self.backend, case, self.calls)

    def test_each_value_that_is_covered(self, covered_case):
        conformance.check_values_and_gradients(self.backend, covered_case, self.calls)

    def test_the_same_bits_twice(self):
        conformance.check_values_and_gradients(self.backend, CASES["plane_replicate"], calls=2)

    def test_float64(self):
        """It is computed in float64, or refused with what to do."""
        case = replace(CASES["plane"], name="float64", dtype="float64")
        with jax.enable_x64(True), computed_or_refused(self.backend):
            conformance.check_values_and_gradients(self.backend, case, self.calls)

    def test_mask(self, mask, kernels):
        conformance.check_mask(self.backend, CASES[mask])

    def test_a_draw_equal_to_the_fire_rate(self, kernels):
        conformance.check_a_draw_equal_to_the_fire_rate(self.backend, CASES["line"])

    def test_a_mask_drawn_by_jax(self):
        conformance.check_mask_drawn_by_jax(self.backend, CASES["plane"])

    def test_fate_hangs_on_dead_neighbours(self, kernels):
        conformance.check_fate_hangs_on_dead_neighbours(self.backend)

    def test_what_is_not_a_number_is_not_hidden(self, activation, kernels):
        case = CASES["always_fires_no_alive"]
        conformance.check_nan_is_not_hidden(self.backend, case, activation)

    def test_transformations(self, transformation):
        check, name = transformation
        TRANSFORMATION_CHECKS[check](self.backend, CASES[name])


class AttentionSuite(Suite):
    """Values, gradients, refusals and transformations of neighbourhood attention.

    Attributes:
        backend: its name.
        attention_cases: the cases whose values and gradients are compared with the oracle's.
        far_from_zero_limit: the largest error ratio where logits are far from zero.
        transformations: (name in ``ATTENTION_CHECKS``, name of a case).
    """

    attention_cases = ATTENTION
    far_from_zero_limit = 1e-2
    transformations = pairs(ATTENTION_CHECKS, ("plane",), without=("values_and_gradients",))

    def parameters(self):
        return {"attention_case": self.attention_cases, "transformation": self.transformations}

    def test_values_and_gradients(self, attention_case):
        ATTENTION_CHECKS["values_and_gradients"](self.backend, attention_case)

    def test_float64(self):
        """It is computed in float64, or refused with what to do."""
        case = replace(ATTENTION_CASES["circular"], name="float64", dtype="float64")
        with jax.enable_x64(True), computed_or_refused(self.backend):
            ATTENTION_CHECKS["values_and_gradients"](self.backend, case)

    @pytest.mark.parametrize("shift", [-20, 20])
    def test_logits_far_from_zero(self, shift):
        case = ATTENTION_CASES["batch_2x3"]
        check_logits_far_from_zero(self.backend, case, shift, self.far_from_zero_limit)

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_nan_spreads_as_in_plain_jax(self, position):
        case = AttentionCase("wide", (9, 12), padding="circular")
        check_nan_spreads(self.backend, case, position)

    def test_transformations(self, transformation):
        check, name = transformation
        ATTENTION_CHECKS[check](self.backend, ATTENTION_CASES[name])
