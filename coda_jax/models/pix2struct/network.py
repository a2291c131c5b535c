"""Pix2Struct: images to text, with T5's layers, decoder and call signatures.

An image is a sequence of flattened patches with their row and column in front. What differs from
text is how these become vectors: there is no relative position bias, rows and columns have learned
embeddings.

Axis letters: B batch, N patches, C = 2 + 3 * patch_size ** 2 channels, D embedding.
"""

from flax import linen as nn
from flax.linen import partitioning
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.models.t5.network import Encoder, Transformer
from coda_jax.nn import layers
from coda_jax.nn.quantized import Quantized, matrix

_IN_FRONT = 2  # row and column of a patch, before its pixels


class PixelProjection(nn.Module):
    """W pixels, of patches with their row and column in front.

    Attributes:
        features: size of the last axis of the result.
        dtype: of the computation.
    """

    features: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, flattened_patches: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        """[B, N, C] -> [B, N, D]."""
        shape = flattened_patches.shape[-1] - _IN_FRONT, self.features
        # "mlp" is T5X's name of an axis that is summed over; it has none for pixels.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = matrix(self, "kernel", init, shape, ("mlp", "embed"))

        def of_slice(patches, kernel):
            pixels = patches[..., _IN_FRONT:]
            if isinstance(kernel, Quantized):
                return layers.product_of_quantized(pixels, kernel, self.dtype)
            return layers.product(pixels, kernel.astype(self.dtype))

        def of_patches(patches, kernel):
            # TPUs hold patches with C as the first axis, and take long to slice and to round that:
            # the matrix gets rows of zeros instead, and the matrix unit rounds.
            rows = jnp.pad(kernel.astype(self.dtype), ((_IN_FRONT, 0), (0, 0)))
            axes = ((2,), (0,)), ((), ())
            y = lax.dot_general(patches, rows, axes, preferred_element_type=jnp.float32)
            return y.astype(self.dtype)

        rounded = self.dtype == jnp.bfloat16 and flattened_patches.dtype == jnp.float32
        tpu = of_patches if rounded else of_slice
        return lax.platform_dependent(flattened_patches, kernel, tpu=tpu, default=of_slice)


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
        project = PixelProjection(cfg.emb_dim, cfg.dtype, name="projection")
        rows, columns = jnp.moveaxis(flattened_patches[..., :_IN_FRONT].astype(jnp.int32), -1, 0)
        x = project(flattened_patches) + bias.astype(cfg.dtype)
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
