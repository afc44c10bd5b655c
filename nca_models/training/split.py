"""Training split over devices and processes: the mesh, and which device holds which arrays.

A mesh has up to four axes, by name: `data` splits the batch, `x`, `y` and `z` the first, second
and third dim of the grid. Weights are on every device.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

NAMES = ("data", "x", "y", "z")
HEARTBEAT = 20  # seconds of silence after which a process counts as lost


@dataclass(frozen=True)
class Split:
    """How a training is split over the devices of a mesh."""

    mesh: Mesh

    def spec(self, num_dims: int) -> P:
        """Return how states `[batch, *spatial, C]` of so many dims are split."""
        names = NAMES[: num_dims - 1]
        return P(*(name if name in self.mesh.shape else None for name in names))

    @property
    def first_process(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return jax.process_index() == 0

    def wait(self, what: str) -> None:
        """Return when every process has called this; `what` names the point in the program."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(what)

    @property
    def whole(self) -> NamedSharding:
        """The sharding of arrays that are on every device."""
        return NamedSharding(self.mesh, P())

    def everywhere(self, tree: Any) -> Any:
        """Return arrays and keys, which are the same in every process, on every device."""

        def put(leaf: Any) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
            return jax.device_put(np.asarray(leaf), self.whole)

        return jax.tree.map(put, tree)

    def pool_shardings(self, samples: Any) -> Any:
        """Return the shardings of the pool: any sample may be drawn, so only grids are split."""
        return jax.tree.map(lambda leaf: self._states(leaf, without="data"), samples)

    def on_devices(self, samples: Any) -> Any:
        """Return a batch of samples, split as a rollout wants it; traced."""
        return jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, self._states(leaf)), samples
        )

    def in_pool(self, samples: Any) -> Any:
        """Return samples, split as in the pool; traced."""
        return jax.lax.with_sharding_constraint(samples, self.pool_shardings(samples))

    def _states(self, leaf: Any, without: str = "") -> NamedSharding:
        """The sharding of a leaf: axes that the mesh divides evenly are split, others are not."""
        if leaf.ndim < 3:
            return self.whole
        names = [
            name if name and name != without and not size % self.mesh.shape[name] else None
            for name, size in zip(self.spec(leaf.ndim), leaf.shape, strict=False)
        ]
        return NamedSharding(self.mesh, P(*names))


def parse(text: str) -> dict[str, int]:
    """Read sizes of mesh axes, as in `data=2,x=4`.

    Raises:
        ValueError: it is not of that form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"({'|'.join(NAMES)})=([1-9][0-9]*)", part.strip())
        if not match or match[1] in sizes:
            raise ValueError(
                f"{text!r} does not name the axes of a mesh: write each of {', '.join(NAMES)} at "
                "most once and with its number of devices, as in data=2,x=4"
            )
        sizes[match[1]] = int(match[2])
    return sizes


def make(sizes: dict[str, int]) -> Split:
    """Return a split over the devices of all processes.

    Raises:
        ValueError: there are too few devices, or, with several processes, too many.
    """
    needed, available = int(np.prod(list(sizes.values()))), jax.device_count()
    if needed > available or (needed < available and jax.process_count() > 1):
        raise ValueError(
            f"a mesh of {' x '.join(f'{n} ({name})' for name, n in sizes.items())} takes {needed} "
            f"devices, and there are {available}; for several on a CPU, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    devices = np.array(jax.devices()[:needed]).reshape(tuple(sizes.values()))
    return Split(Mesh(devices, tuple(sizes)))


def join(coordinator: str, processes: int | None, process: int | None) -> None:
    """Connect this process with the others; this comes before any other use of JAX.

    Args:
        coordinator: `HOST:PORT` of process 0, or "auto": as the cluster's environment says (see
            `jax.distributed.initialize`).
        processes, process: the number of processes, and that of this one; None with "auto".

    Raises:
        ValueError: the cluster's environment says nothing.
    """
    if coordinator != "auto":
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "--coordinator auto: no cluster's environment (SLURM, Open MPI, ...) is found here; "
            "give --coordinator HOST:PORT --processes N --process-id I"
        ) from error


def local(tree: Any) -> Any:
    """Return arrays that are on every device as arrays of one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def means_a_lost_process(error: Exception) -> bool:
    """Tell whether an error means that another process has ended, by the transports' words."""
    words = ("gloo", "nccl", "heartbeat", "unavailable", "coordination", "barrier", "connection")
    return jax.process_count() > 1 and any(word in str(error).lower() for word in words)
