"""A rollout over several processes against one on one device: test_processes.py runs it in each.

``python one_of_many_processes.py COORDINATOR PROCESSES ID``
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nca_kernels as nk
from nca_kernels.testing import Case


def check(case: Case, shape: tuple[int, ...], spec: P, per_exchange: int) -> None:
    params, state, key, _ = case.arguments()
    names = ("x", "y", "z")[: len(shape)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names)

    def loss(rollout):
        def total(params, state):
            final = rollout(params, state)
            return jnp.sum(final * jnp.sin(final)), final

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    on_one_device = loss(lambda p, s: nk.rollout(case.rule, p, s, key, 5, backend="cpu"))
    many = loss(
        lambda p, s: nk.sharded_rollout(
            case.rule, p, s, key, 5, backend="cpu", mesh=mesh, partition_spec=spec,
            steps_per_exchange=per_exchange,
        )
    )  # fmt: skip
    (_, expected), expected_gradients = on_one_device(params, state)
    host = np.asarray(state)
    sharding = NamedSharding(mesh, spec)
    split = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    (_, final), gradients = many(params, split)
    for shard in final.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        a, b = np.asarray(a.addressable_data(0)), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


if __name__ == "__main__":
    coordinator, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    jax.distributed.initialize(coordinator, processes, process)
    assert jax.process_count() == processes
    flat = Case("flat", (24, 20), nk.Rule(padding="reflect"), batch=(2,), channels=4, hidden=(6,))
    check(flat, (2, 2), P(None, "x", "y"), 2)
    deep = Case(
        "deep", (12, 9, 8), nk.Rule(padding="circular"), batch=(1,), channels=3, hidden=(6,)
    )
    check(deep, (4,), P(None, "x"), 1)
    print("as one device")
