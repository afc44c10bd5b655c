"""What sharded and tiled rollouts share: how far a step reaches, and the step of a part.

A part is a window of a larger state. It is stepped like a state of its own: cells near an end of
the window, which miss neighbours there, come out wrong, and the caller drops them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from nca_kernels.dispatch import requested
from nca_kernels.fire_mask import drawn_at
from nca_kernels.ops.rollout import AfterStep, AfterStepCaller
from nca_kernels.ops.step import step
from nca_kernels.perception import ConstantTaps, constant_taps, depthwise, same_margins
from nca_kernels.rule import Controls, Rule, RuleParams


def reach(rule: Rule, params: RuleParams) -> list[int]:
    """Along each grid dim: how many cells away lies the farthest cell that a step depends on."""
    margins = same_margins(np.shape(params.perception)[:-2])
    return [max(margin) + (rule.alive.radius if rule.alive else 0) for margin in margins]


@dataclass(frozen=True)
class PartAxis:
    """A dim of the whole state, batch or grid: what each part of it keeps and what it sees.

    Args:
        size: cells of the whole.
        core: cells that a part keeps.
        halo: cells that a part sees on either side of those, at most.
        periodic: whether the last cell of the whole is a neighbour of the first.
    """

    size: int
    core: int
    halo: int
    periodic: bool

    def positions(self, first: Any, length: int) -> Array:
        """The positions in the whole of cells that begin at ``first``: ``int32 [length]``.

        ``first`` may lie before the whole. Beyond a border that is not periodic, where no cells
        are, the numbers just go on.
        """
        positions = first + jnp.arange(length)
        return positions % self.size if self.periodic else positions


@dataclass(frozen=True)
class PartStep:
    """The step of a part: calling it equals ``nk.step`` on the whole, seen through a window.

    Args:
        rule: what a step computes, but for its arrays.
        backend: the name that was asked for.
        bank: the taps, if they are constant, see :func:`nca_kernels.perception.constant_taps`.
        after_step: as for :func:`nca_kernels.rollout`.
        shape: of the whole state without its channels, ``(*batch, *spatial)``.
        num_batch_dims: how many dims of ``shape`` are the batch.
    """

    rule: Rule
    backend: str
    bank: ConstantTaps
    after_step: AfterStep | None
    shape: tuple[int, ...]
    num_batch_dims: int

    @classmethod
    def of(
        cls, rule: Rule, params: RuleParams, state: Any, backend: str, after_step: AfterStep | None
    ) -> PartStep:
        """The step of the parts of ``state`` ``[*batch, *spatial, C]``."""
        shape = np.shape(state)
        bank = constant_taps(params.perception, shape[-1])
        num_batch_dims = len(shape) + 1 - np.ndim(params.perception)
        rule, _ = Controls.split(rule)
        return cls(rule, requested(backend), bank, after_step, shape[:-1], num_batch_dims)

    def __call__(
        self,
        learned: tuple[RuleParams, Controls],
        state: Array,
        at: tuple[Array, Any],
        inputs: Array | None,
        positions: Sequence[Array],
    ) -> Array:
        """The part after a step.

        Right for cells that lie at least ``reach`` away from an end of the part, and up to those
        ends that are borders of the whole.

        Args:
            learned: the weights, and the arrays of the rule for the part's samples.
            at: the number of the step, and its key or the part's mask.
            positions: by dim, which cells of the whole the part shows.
        """
        params, controls = learned
        rule, (t, source) = controls.join(self.rule), at
        if self.bank is not None:  # constant, although the caller's jit has traced the weights
            kernel = params.perception.shape[:-2]
            bank = np.reshape(np.asarray(self.bank, np.float32), (*kernel, -1))
            params = replace(params, perception=depthwise(bank, state.shape[-1]))
        fire = source
        if source.dtype != jnp.bool_ and (controls.fire_rate is not None or rule.fire_rate < 1.0):
            fire = drawn_at(source, rule.fire_rate, self.shape, positions)
        new = step(rule, params, state, fire, inputs, self.backend)
        end_step = AfterStepCaller(self.after_step)
        return end_step(state, new, positions[self.num_batch_dims :], t, source)
