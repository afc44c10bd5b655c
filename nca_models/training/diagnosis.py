"""What is wrong with a training that goes on all the same, by its losses alone.

No training step computes anything for it. If all cells are dead, the loss is that of empty states,
to the bit, and stays so: its gradient is zero.
"""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nca_models.systems import System
from nca_models.training import logging

_DEAD_AFTER = 20  # steps without movement of the loss, after which dead cells are looked for
_STUCK_AFTER = 200  # such steps after which a training counts as stuck
_LEARNS_WITHIN = 500  # training steps within which the loss must fall; it may rise before


class Ailment(NamedTuple):
    """What is wrong with a training, in a line, and whether it is that all cells died."""

    line: str
    dead: bool


def diagnose(system: System, folder: Path) -> Ailment | None:
    """Say what is wrong with the training of a run, by its log; None if nothing is.

    Raises:
        DataError: the log is damaged.
    """
    path = folder / "log.csv"
    losses, unmoved = logging.read(path)[1], logging.read_unmoved(path)
    if unmoved >= _DEAD_AFTER and (ailment := _unmoved(system, losses[-1], unmoved, len(losses))):
        return ailment
    width = min(100, len(losses) // 2)
    first, last = np.mean(losses[:10]), np.mean(losses[-width:])
    if width < 10 or last == 0 or last < (first if len(losses) >= _LEARNS_WITHIN else 10 * first):
        return None
    return Ailment(
        f"nothing was learned: the mean loss of the last {width} steps, {last:.3g}, is not below "
        f"that of the first 10, {first:.3g}; {_advice(system)}",
        dead=False,
    )


def while_training(system: System, loss: float, unmoved: int, step: int) -> Ailment | None:
    """Say what is wrong after `step`, but only once while the loss does not move.

    `unmoved` is the number of steps for which it has not; see `nca_models.training.logging.Log`.
    """
    if unmoved not in (_DEAD_AFTER, _STUCK_AFTER):
        return None
    ailment = _unmoved(system, loss, unmoved, step)
    said_before = ailment is not None and ailment.dead and unmoved > _DEAD_AFTER
    return None if said_before else ailment


def _unmoved(system: System, loss: float, unmoved: int, step: int) -> Ailment | None:
    """What a loss means that has not moved for `unmoved` steps up to `step`."""
    since = f"since step {step - unmoved}"
    if np.isclose(loss, _loss_of_the_dead(system), rtol=1e-5, atol=0):
        line = f"all cells are dead {since}, and the loss has no gradient any more"
        return Ailment(f"{line}; {_advice(system)}", dead=True)
    if unmoved >= _STUCK_AFTER:
        return Ailment(f"the loss has not moved {since}; {_advice(system)}", dead=False)
    return None


def _loss_of_the_dead(system: System) -> float:
    """The mean error of samples without a living cell; NaN if the system's have no states."""
    samples = system.fresh(jax.random.key(0), system.config.batch_size)
    if not isinstance(samples, dict) or "state" not in samples:
        return math.nan
    return float(jnp.mean(system.errors(samples | {"state": jnp.zeros_like(samples["state"])})))


def _advice(system: System) -> str:
    rate = f"{system.config.learning_rate:g}"
    return f"start anew with a --learning-rate below {rate} and another --out"
