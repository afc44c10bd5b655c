"""What is lowered for machines that are not here, and how long compiling takes to grow."""

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from nca_kernels.testing import CONFORMANCE

CASE = next(case for case in CONFORMANCE if case.name == "plane")
PARAMS, STATE, KEY, _ = CASE.arguments()


def loss(params, state):
    return jnp.sum(nk.step(CASE.rule, params, state, KEY, backend="auto"))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_lowers_for_accelerators(platform):
    """They compute all cells at once: no branch, and no loop whose length the host waits for."""
    text = jax.jit(jax.grad(loss)).trace(PARAMS, STATE).lower(lowering_platforms=(platform,))
    text = text.as_text()
    assert "@nca_xla_forward" in text
    assert "@nca_xla_backward" in text
    assert "stablehlo.case" not in text


def test_exports_for_several_platforms_at_once():
    leaves, tree = jax.tree.flatten(PARAMS)
    run = jax.jit(lambda leaves, state: loss(jax.tree.unflatten(tree, leaves), state))
    export = jax.export.export(
        run, platforms=("cpu", "cuda"), disabled_checks=nk.DISABLE_JAX_EXPORT_CHECKS
    )
    exported = export(leaves, STATE)
    assert exported.platforms == ("cpu", "cuda")
    assert jnp.allclose(exported.call(leaves, STATE), run(leaves, STATE))


def test_a_python_loop_of_steps_compiles_in_proportion():
    """XLA must not fuse one step into the next: instructions grow with the steps, no faster."""

    def instructions(steps):
        def unrolled(params, state):
            for t in range(steps):
                key = jax.random.fold_in(KEY, t)
                state = nk.step(CASE.rule, params, state, key, backend="xla")
            return jnp.sum(state**2)

        compiled = jax.jit(jax.grad(unrolled)).lower(PARAMS, STATE).compile()
        return len(compiled.as_text().splitlines())

    two, four = instructions(2), instructions(4)
    assert four < 2.5 * two
