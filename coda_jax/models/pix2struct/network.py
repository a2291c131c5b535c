"""Pix2Struct: images to text, with T5's layers, decoder and call signatures.

An image is a sequence of flattened patches with their row and column in front. What differs from
text is how these become vectors: there is no relative position bias, rows and columns have learned
embeddings.

Axis letters: B batch, N patches, C = 2 + 3 * patch_size ** 2 channels, D embedding.
"""

from flax import linen as nn
from flax.linen import partitioning
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.models.t5.network import Encoder, Transformer
from coda_jax.nn import layers


class PatchEmbed(nn.Module):
    """Patches as vectors: W pixels + bias + row embedding + column embedding."""

    config: Pix2StructConfig

    @nn.compact
    def __call__(self, flattened_patches: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        """[B, N, C] -> [B, N, D]."""
        cfg = self.config

        def positions(name):
            return layers.Embed(cfg.num_positions, cfg.emb_dim, cfg.dtype, name=name)

        bias = partitioning.param_with_axes(
            "bias", nn.initializers.zeros, (cfg.emb_dim,), jnp.float32, axes=("embed",)
        )
        # "mlp" is T5X's name of an axis that is summed over; it has none for pixels.
        project = layers.Dense(
            cfg.emb_dim, kernel_axes=("mlp", "embed"), dtype=cfg.dtype, name="projection"
        )
        rows, columns = jnp.moveaxis(flattened_patches[..., :2].astype(jnp.int32), -1, 0)
        x = project(flattened_patches[..., 2:]) + bias.astype(cfg.dtype)
        return x + positions("row_embedder")(rows) + positions("column_embedder")(columns)


class Pix2Struct(Transformer):
    """Pix2Struct, called as T5X calls its network, with patches for the encoder's tokens.

    `encoder_input_tokens` is [B, N, C] float32: row and column ids from 1, then the pixels. Row id
    0 is padding. Reference: Lee et al. 2023, Pix2Struct, arXiv 2210.03347.
    """

    config: Pix2StructConfig

    def make_encoder(self) -> Encoder:
        """The encoder, as `setup` attaches it."""
        self.patch_embedder = PatchEmbed(self.config)
        return Encoder(self.config, self.patch_embedder)

    @staticmethod
    def input_mask(encoder_input_tokens: Float[Array, "b n c"]) -> Bool[Array, "b n"]:
        """False for padding patches, whose row id is 0."""
        return encoder_input_tokens[..., 0] > 0
