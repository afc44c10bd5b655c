"""A CAX perceive whose cells attend to the cells around them; see `nca_models.compat.cax`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

import nca_kernels as nk
from nca_models.compat.cax_facts import cax_is_needed
from nca_models.modules import position_embeddings

with cax_is_needed():
    from cax.core.perceive import Perceive


class MooreAttentionPerceive(Perceive):
    """Multi-head attention of each cell to its Moore neighbourhood, linear in the cells.

    This is the perceive of CAX's attention example (47; ViTCA, Tesfaldet et al., arXiv 2211.01233):
    a linear projection of the state is joined with learned position embeddings of each axis, and
    each cell attends to the cells of the grid that are at most `radius` away. The parameters have
    the names, shapes and initial values of that example, so its checkpoints load.

    It is equivalent to `nnx.MultiHeadAttention` over all cells with a mask of `cells * cells`
    entries.
    """

    fused_by_itself = True

    def __init__(
        self,
        channel_size: int,
        perception_size: int,
        *,
        num_heads: int,
        hidden_size: int,
        proj_size: int,
        max_position_size: int,
        position_embed_features: int = 4,
        num_spatial_dims: int = 2,
        radius: int = 1,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        """Build the projection, the embeddings and the attention.

        Args:
            channel_size: C, the channels of the state.
            perception_size: P, the width of the perception.
            num_heads: heads of the attention.
            hidden_size: width of queries, keys and values, all heads together.
            proj_size: width that the state is projected to.
            max_position_size: the longest axis that the grid may have.
            position_embed_features: width of the position embedding of one axis.
            num_spatial_dims: 1, 2 or 3.
            radius: how far a cell attends.
            backend: name of the `nca_kernels` backend, or "auto".
            rngs: source of the initial weights.
        """
        self.linear = nnx.Linear(in_features=channel_size, out_features=proj_size, rngs=rngs)
        self.position_embed_features = position_embed_features
        self.position_embed = nnx.Embed(
            num_embeddings=max_position_size, features=position_embed_features, rngs=rngs
        )
        self.attention = nnx.MultiHeadAttention(
            num_heads=num_heads,
            in_features=proj_size + num_spatial_dims * position_embed_features,
            qkv_features=hidden_size,
            out_features=perception_size,
            decode=False,
            rngs=rngs,
        )
        self.num_spatial_dims = num_spatial_dims
        self.radius = radius
        self.backend = backend

    def __call__(self, state: Any) -> Array:
        """Perceive.

        Args:
            state: `[*batch, *spatial, C]`.

        Returns:
            `[*batch, *spatial, P]`.

        Raises:
            ValueError: an axis of the grid is longer than `max_position_size`.
        """
        spatial = state.shape[-1 - self.num_spatial_dims : -1]
        if max(spatial) > self.position_embed.num_embeddings:
            raise ValueError(
                f"the grid {spatial} is longer than max_position_size, "
                f"{self.position_embed.num_embeddings}"
            )
        positions = position_embeddings(self.position_embed, state, self.num_spatial_dims)
        tokens = jnp.concatenate([self.linear(state), *positions], axis=-1)
        query, key, value = (
            project(tokens)  # [*batch, *spatial, heads, d]
            for project in (self.attention.query, self.attention.key, self.attention.value)
        )
        attended = nk.neighborhood_attention(
            query, key, value, self.radius, self.num_spatial_dims, self.backend
        )
        out: Array = self.attention.out(attended)
        return out
