"""Pix2Struct: images to text, with the layers, the decoder and the call signatures of `network`.

An image is a sequence of flattened patches with their row and column in front. What differs from
text is how these become vectors: there is no relative position bias, rows and columns have learned
embeddings.

Axis letters: B batch, N patches, C = 2 + 3 * patch_size ** 2 channels, D embedding.
"""

from typing import ClassVar

from flax import linen as nn
from flax import struct
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coda_jax import layers
from coda_jax.network import Encoder, T5Config, Transformer


@struct.dataclass
class Pix2StructConfig(T5Config):
    """Sizes and options of a Pix2Struct: those of a T5, and those of its patches.

    Attributes:
        patch_size: height and width of a patch in pixels of three colours.
        num_positions: rows of each of the two position embeddings. A row or column id that is not
            below it makes the outputs NaN.
    """

    family: ClassVar[str] = "pix2struct"

    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    patch_size: int = 16
    num_positions: int = 4096

    def __post_init__(self):
        super().__post_init__()
        for name in ("patch_size", "num_positions"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Pix2StructConfig.{name} must be at least 1, got {getattr(self, name)}"
                )

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return 3 * self.patch_size**2

    def network(self) -> "Pix2Struct":
        """The network of this configuration."""
        return Pix2Struct(self)

    def input_spec(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the encoder's inputs, [B, N, C] float32 flattened patches."""
        return jax.ShapeDtypeStruct((batch, length, 2 + self.patch_dim), jnp.float32)


class PatchEmbed(nn.Module):
    """Patches as vectors: W pixels + bias + row embedding + column embedding."""

    config: Pix2StructConfig

    @nn.compact
    def __call__(self, flattened_patches: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
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
        return Encoder(self.config, self.patch_embedder, relative_positions=False)

    @staticmethod
    def input_mask(encoder_input_tokens: Float[Array, "b n c"]) -> Bool[Array, "b n"]:
        """False for padding patches, whose row id is 0."""
        return encoder_input_tokens[..., 0] > 0
