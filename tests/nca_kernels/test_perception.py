"""The filter banks: what they compute on known functions, and how taps are laid out."""

import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels import perception
from nca_kernels.backends.reference.plain_step import perceive

RULE = nk.Rule(precision="float32")


def apply(bank, field):
    """A bank's filters on a field ``[*S]``, interior cells only: ``[*S - 2, F]``."""
    taps = nk.taps([bank], channels=1, num_spatial_dims=field.ndim)
    out = perceive(RULE, nk.RuleParams(jnp.asarray(taps)), jnp.asarray(field[..., None]))
    return np.asarray(out)[(slice(1, -1),) * field.ndim]


def test_which_taps_are_constant():
    taps = nk.taps(("identity", "sobel"), channels=5)
    bank = nk.filter_bank(("identity", "sobel")).astype(np.float32)
    assert perception.constant_taps(taps, 5) == tuple(bank.ravel().tolist())
    assert perception.constant_taps(jnp.asarray(taps), 5) is None, "JAX's may be trained"
    assert perception.constant_taps(nk.taps(("mean",), 5), 5) is None, "nothing to leave out"
    assert perception.constant_taps(np.zeros((3, 3, 5, 7), np.float32), 5) is None, "dense"
    other, infinite = taps.copy(), taps.copy()
    other[1, 1, 0, 3] += 1
    infinite[..., 0::3] = np.inf
    assert perception.constant_taps(other, 5) is None, "channels differ"
    assert perception.constant_taps(infinite, 5) is None
    assert perception.constant_taps(nk.taps(("moore",) * 20, 1), 1) is None, "too much code"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_on_a_linear_field(n):
    slope = np.array([0.5, -2.0, 3.0])[:n]
    field = np.tensordot(slope, np.indices((6, 5, 7)[:n]), 1).astype(np.float32)
    inside = field[(slice(1, -1),) * n]
    np.testing.assert_allclose(apply("identity", field)[..., 0], inside, atol=1e-5)
    np.testing.assert_allclose(apply("mean", field)[..., 0], inside, atol=1e-5)
    for bank, gain in (("sobel", 2 / 2), ("gradient", 1.0)):
        # An L1-normalised Sobel weighs the two neighbours by 1/2 each, as a central difference.
        expected = np.broadcast_to(slope * gain, (*inside.shape, n))
        np.testing.assert_allclose(apply(bank, field), expected, atol=1e-5)
    for bank in ("laplacian", "laplacian_moore"):
        np.testing.assert_allclose(apply(bank, field), 0, atol=2e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_laplacian_of_a_square(n):
    field = (np.indices((6, 5, 7)[:n]) ** 2).sum(0).astype(np.float32)
    np.testing.assert_allclose(apply("laplacian", field), 2 * n, atol=1e-4)


def test_shapes_and_known_values():
    for n in (1, 2, 3):
        sizes = {name: bank(n).shape[-1] for name, bank in perception.BANKS.items()}
        assert sizes["moore"] == 3**n
        assert sizes["von_neumann"] == 2 * n + 1
        assert sizes["sobel"] == sizes["gradient"] == n
    sobel = perception.sobel(2, normalize=False)
    np.testing.assert_array_equal(sobel[..., 1], [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    assert np.abs(perception.sobel(3)).sum((0, 1, 2)) == pytest.approx([1, 1, 1])
    nine = perception.laplacian_moore(2)[..., 0]
    np.testing.assert_array_equal(nine, [[1, 2, 1], [2, -12, 2], [1, 2, 1]])


def test_neighbourhood_banks_pick_cells():
    field = np.arange(25, dtype=np.float32).reshape(5, 5)
    np.testing.assert_array_equal(apply("moore", field)[1, 1], field[1:4, 1:4].ravel())
    np.testing.assert_array_equal(apply("von_neumann", field)[1, 1], [12, 7, 17, 11, 13])


def test_layout_is_channel_major():
    taps = nk.taps(["identity", "sobel"], channels=4)
    assert taps.shape == (3, 3, 1, 12)
    assert taps.dtype == np.float32
    bank = nk.filter_bank(["identity", "sobel"])
    for c in range(4):
        np.testing.assert_allclose(taps[:, :, 0, 3 * c : 3 * c + 3], bank, rtol=1e-6)


def test_banks_of_other_sizes_are_centred():
    wide = np.ones((5, 3, 2))
    bank = nk.filter_bank(["identity", wide])
    assert bank.shape == (5, 3, 3)
    assert bank[2, 1, 0] == 1
    assert bank[..., 0].sum() == 1
    np.testing.assert_array_equal(bank[..., 1:], wide)
