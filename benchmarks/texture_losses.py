"""What the texture loss sees: pictures whose pixels themselves are trained, without an automaton.

``python -m benchmarks.texture_losses --save`` takes two minutes. Each texture is made from noise
with filters that stay the same, which is how random features are commonly used, and with filters
that are new in every step. The figures are distances by the descriptor of
``nca_models.measures.textures``, which neither of them is trained for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gallery import TARGETS
from benchmarks.measure import ROOT, device_name, provenance
from nca_kernels.files import write_json
from nca_models import render
from nca_models.data.textures import texture
from nca_models.measures.textures import distance
from nca_models.texture_loss import patch_transport, pyramid

SIZE, STEPS = 40, 500
PICTURE = Path(__file__).parents[1] / "docs" / "gallery" / "texture_losses.png"


def trained_pixels(exemplar: np.ndarray, *, new_filters: bool) -> np.ndarray:
    """A picture ``[size, size, 3]`` uint8 that is made to be like ``exemplar``."""
    wanted = pyramid(jnp.asarray(exemplar, jnp.float32)[None] / 255)
    adam = optax.adam(optax.linear_schedule(0.03, 0.001, STEPS))

    @jax.jit
    def descend(pixels, state, key):
        loss = lambda pixels: patch_transport(pyramid(pixels), wanted, key)[0]
        updates, state = adam.update(jax.grad(loss)(pixels), state)
        return optax.apply_updates(pixels, updates), state

    pixels = jax.random.uniform(jax.random.key(1), (1, SIZE, SIZE, 3))
    state = adam.init(pixels)
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(0), step if new_filters else 0)
        pixels, state = descend(pixels, state, key)
    return (np.clip(np.asarray(pixels[0]), 0, 1) * 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="picture and figures")
    args = parser.parse_args()
    strips, figures = [], {}
    for name in TARGETS["dynamics"]:
        exemplar = np.asarray(texture(name, SIZE))
        made = {
            words: trained_pixels(exemplar, new_filters=new)
            for words, new in (("the same filters", False), ("new filters in every step", True))
        }
        figures[name] = {words: distance(picture, exemplar) for words, picture in made.items()}
        print(name, figures[name], flush=True)
        strips.append(render.beside([exemplar, *made.values()]))
    if args.save:
        render.save_png(PICTURE, render.upscale(render.above(strips), 4))
        about = provenance("python -m benchmarks.texture_losses --save")
        path = ROOT / "results" / device_name() / "texture_losses.json"
        write_json(path, {**about, "distances": figures})


if __name__ == "__main__":
    main()
