"""What sharded and tiled rollouts share: how far a step reaches, and the step of a part.

A part is a window of a state, with the places of the whole that it shows. It is stepped on like a
state of its own: what a step reaches beyond a window's end is wrong, and is dropped by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

from nca_kernels.fire_mask import drawn_at
from nca_kernels.ops.rollout import AfterStep, broadcast_places
from nca_kernels.ops.step import nca_step
from nca_kernels.perception import ConstantTaps, same_margins
from nca_kernels.rule import Rule, RuleParams


def reach(rule: Rule, params: RuleParams) -> list[int]:
    """Along each grid dim: how many cells away a step of a cell sees anything."""
    margins = same_margins(np.shape(params.perception)[:-2])
    return [max(margin) + (rule.alive.radius if rule.alive else 0) for margin in margins]


@dataclass(frozen=True)
class PartStep:
    """The static facts of the steps of parts.

    Args:
        rule: what a step computes.
        backend: a name that was asked for, see ``nca_kernels.dispatch.requested``.
        constant: taps that are compiled in, see ``nca_kernels.perception.constant_taps``.
        after_step: as for :func:`nca_kernels.rollout`.
        shape: the whole state's, ``(*batch, *spatial)``.
        num_batch_dims: how many of these are the batch.
    """

    rule: Rule
    backend: str
    constant: ConstantTaps
    after_step: AfterStep | None
    shape: tuple[int, ...]
    num_batch_dims: int

    def __call__(
        self,
        params: RuleParams,
        state: Array,
        key: Any,
        inputs: Array | None,
        places: Sequence[Array],
    ) -> Array:
        """A step of the part that shows these places of the whole, by dim.

        Right for the cells that are no nearer to an end of the part than a step reaches, or where
        that end is a border of the whole.
        """
        if self.rule.fire_rate < 1.0:
            key = drawn_at(key, self.rule.fire_rate, self.shape, places)
        new = nca_step(self.rule, params, state, key, inputs, self.backend, self.constant)
        if self.after_step is not None:
            new = self.after_step(state, new, broadcast_places(places[self.num_batch_dims :]))
        return new
