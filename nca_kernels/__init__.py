"""Fused steps for neural cellular automata in JAX: arrays in, arrays out.

``nk.step`` is one step, ``nk.rollout`` many, ``nk.sharded_rollout`` many on many devices,
``nk.tiled_rollout`` many of a lattice that only the host's memory holds;
``nk.update`` is a step whose perception is given.
``nk.neighborhood_attention`` lets every cell attend to the cells around it.
``nk.Rule`` and ``nk.RuleParams`` say what a step computes; ``nk.taps`` makes perceptions from
filter banks by name. ``nk.backends()`` says what runs here, and why not; ``nk.cost`` what a step
costs at least.
"""

import nca_kernels.backends as _backends  # registers every backend
from nca_kernels.cost import Cost, cost
from nca_kernels.dispatch import BackendUnavailable, backends, export_checks
from nca_kernels.ops.neighborhood_attention import neighborhood_attention
from nca_kernels.ops.rollout import rollout
from nca_kernels.ops.sharded_rollout import sharded_rollout
from nca_kernels.ops.step import step
from nca_kernels.ops.tiled_rollout import tiled_rollout
from nca_kernels.ops.update import update
from nca_kernels.perception import filter_bank, taps
from nca_kernels.rule import Alive, Rule, RuleParams

__version__ = "0.1.0"

# For jax.export.export(..., disabled_checks=nk.DISABLE_JAX_EXPORT_CHECKS). JAX cannot promise that
# an exported module with custom calls still runs with later versions, and wants to be told of them.
DISABLE_JAX_EXPORT_CHECKS = export_checks()

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "Alive",
    "BackendUnavailable",
    "Cost",
    "Rule",
    "RuleParams",
    "backends",
    "cost",
    "filter_bank",
    "neighborhood_attention",
    "rollout",
    "sharded_rollout",
    "step",
    "taps",
    "tiled_rollout",
    "update",
]
del _backends, export_checks
