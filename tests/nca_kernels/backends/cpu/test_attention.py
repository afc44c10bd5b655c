"""``neighborhood_attention`` of the native kernels, on every instruction set."""

from dataclasses import replace

import jax
import pytest

from nca_kernels.backends.cpu import library
from nca_kernels.testing import ATTENTION_CHECKS, AttentionCase
from nca_kernels.testing.attention_conformance import attention
from nca_kernels.testing.compare import assert_same_bits
from tests.nca_kernels.backends.suite import ATTENTION_CASES, AttentionSuite

SETS = () if library.missing() else library.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=f"no native kernels: {library.missing()}")
# The native kernels cut these into several tiles; heads and channels do not fill vectors.
TILES = (
    AttentionCase("tiles_of_a_line", (700,), radius=3, head_size=20, padding="circular"),
    AttentionCase("tiles_of_a_plane", (29, 40), batch=(1,), heads=5, radius=2),
    AttentionCase("tiles_of_a_volume", (9, 8, 11), heads=3, head_size=3, padding="circular"),
    AttentionCase("tiles_in_bfloat16", (17, 33), head_size=33, dtype="bfloat16"),
)


class TestAttention(AttentionSuite):
    backend = "cpu"


OF_EVERY_SET = (*TILES, *(ATTENTION_CASES[name] for name in ("circular_beyond_grid", "bfloat16")))


@pytest.mark.parametrize("case", OF_EVERY_SET, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_values_and_gradients_of_instruction_sets(instruction_set, case):
    with library.using(instruction_set):
        ATTENTION_CHECKS["values_and_gradients"]("cpu", case)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_same_bits_however_tiles_are_cut(padding):
    """A sample alone is cut into more tiles than one of a batch: no sum may depend on the cut."""
    case = AttentionCase("samples", (40, 23), heads=3, head_size=7, padding=padding)
    arrays = replace(case, batch=(24,)).arguments()

    def run(*arrays):
        out, pull = jax.vjp(attention("cpu", case), *arrays)
        return out, pull(out)

    alone, all_of_them = run(*(a[:1] for a in arrays)), run(*arrays)
    assert_same_bits(alone, jax.tree.map(lambda a: a[:1], all_of_them), "another cut")
