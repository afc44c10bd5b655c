"""Exports the jitted training step of Growing NCA for a CUDA GPU, with the Triton kernels.

This is a program of its own because Triton compiles here, which it cannot do in a process that
interprets; no GPU is needed. It prints JSON: the number of exported bytes, and how often each
kernel is launched in a loop's body.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["NCA_BACKEND"] = "triton"
os.environ["NCA_CUDA_ARCH"] = sys.argv[2]

import jax
from jax import export

import nca_kernels as nk
from nca_models.systems import growing
from nca_models.training.trainer import Trainer

KERNEL = re.compile(r"call @nca_triton_(\w+?)(?:_\d+)?\(")


def main() -> None:
    folder = Path(sys.argv[1])
    config = growing.PRESETS["paper"]
    growing.SystemClass.prepare(config, None, folder)
    trainer = Trainer(growing.SystemClass(config, folder))
    state = jax.eval_shape(trainer.initial_state)
    flat, tree = jax.tree.flatten(state)
    key = jax.ShapeDtypeStruct((2,), "uint32")

    def step(flat, key):
        state, loss = trainer._step(jax.tree.unflatten(tree, flat), jax.random.wrap_key_data(key))
        return jax.tree.leaves(state), loss

    checks = nk.DISABLE_JAX_EXPORT_CHECKS
    exported = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=checks)(flat, key)
    text = exported.mlir_module()
    # Each function of the module is a piece of the program: a step, or a part of its gradient.
    pieces = [Counter(KERNEL.findall(f)) for f in text.split("func.func")]
    pieces = [dict(p) for p in pieces if p]
    print(json.dumps({"bytes": len(exported.serialize()), "launches": pieces}))


if __name__ == "__main__":
    main()
