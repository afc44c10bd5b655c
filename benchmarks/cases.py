"""The cases that are timed: those of `nca_kernels.testing` and jax-nca's, at two sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

import nca_kernels as nk
from nca_kernels.testing import BENCHMARKS, Case
from nca_kernels.testing.cases import Arguments
from nca_models.compat import jax_nca


class JaxNcaCase(Case):
    """The NCA of jax-nca, whose perception (Sobel filters summed over channels) is fixed."""

    def _nca(self) -> jax_nca.NCA:
        return jax_nca.NCA(num_hidden_channels=self.channels - 4)

    def flax_params(self) -> Any:
        """Parameters with the names and shapes of jax-nca, none of them zero."""
        state = jnp.zeros((1, *self.grid, self.channels))
        params = self._nca().init(jax.random.key(1), state, jax.random.key(1))["params"]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        noise = [0.05 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)]
        return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise)])

    def arguments(self, seed: int = 0) -> Arguments:
        """Random arguments with the parameters of jax-nca."""
        return super().arguments(seed)._replace(params=self._nca().rule_params(self.flax_params()))


JAX_NCA = JaxNcaCase(
    "jax_nca",
    (64, 64),
    nk.Rule(fire_rate=1.0, alive=nk.Alive(channel=3)),
    batch=(8,),
    channels=20,
    dense=22,
    hidden=(64, 64),
)
FULL = {case.name: case for case in (*BENCHMARKS, JAX_NCA)}
# Small enough that the slowest peer's gradients take seconds.
_QUICK = {
    "growing": ((32, 32), (8,)),
    "diffusing": ((32, 32), (2,)),
    "self_autoencoding": ((12, 12, 12), (1,)),
    "jax_nca": ((32, 32), (4,)),
}
QUICK = {
    name: replace(case, grid=_QUICK[name][0], batch=_QUICK[name][1]) for name, case in FULL.items()
}
TITLES = {
    "growing": "Growing NCA",
    "diffusing": "Diffusing NCA",
    "self_autoencoding": "3-D lattice",
    "jax_nca": "jax-nca's NCA",
}
MODES = {"forward": "forward", "training": "forward and backward"}
