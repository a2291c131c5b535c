"""Pix2Struct's configuration and the published sizes.

Axis letters: B batch, N patches, C = 2 + 3 * patch_size ** 2 channels.
"""

from collections.abc import Mapping
from typing import ClassVar

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from coda_jax import checks
from coda_jax.models.t5.config import T5Config, sizes


@struct.dataclass
class Pix2StructConfig(T5Config):
    """Sizes and options of a Pix2Struct: those of a T5, and those of its patches.

    Attributes:
        patch_size: height and width of a patch in pixels of three colours.
        num_positions: rows of each of the two position embeddings. A row or column id that is not
            below it makes the outputs NaN; see `misplaced`.
    """

    family: ClassVar[str] = "pix2struct"
    biased: ClassVar[tuple[str, ...]] = ("self_attention",)
    head_kinds: ClassVar[tuple[str, ...]] = ()
    field_checks: ClassVar[Mapping[str, checks.Check]] = {
        **T5Config.field_checks,
        "patch_size": checks.COUNT,
        "num_positions": checks.COUNT,
    }

    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    patch_size: int = 16
    num_positions: int = 4096

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return 3 * self.patch_size**2

    def misplaced(self, inputs: np.ndarray) -> str | None:
        """Why the network has no places for patches [n, C]; None where it has."""
        places = inputs[:, :2]
        if not (places[:, 0] > 0).any():
            return "its patches are padding alone: none has a row"
        if (places != np.rint(places)).any() or places.min() < 0:
            return "its rows and columns are not whole numbers from 1, or 0 for padding"
        if (most := int(places.max())) >= self.num_positions:
            side = "rows" if places[:, 0].max() == most else "columns"
            return (
                f"it has {most:,} {side} of patches, and the model positions for "
                f"{self.num_positions - 1:,}: give Decoding.max_input_length, or "
                "TASK_FEATURE_LENGTHS, fewer patches, or cut so long a picture"
            )
        return None

    def network(self) -> nn.Module:
        """The network of this configuration."""
        from coda_jax.models.pix2struct.network import Pix2Struct  # which reads this class

        return Pix2Struct(self)

    def input_spec(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the encoder's inputs, [B, N, C] float32 flattened patches."""
        return jax.ShapeDtypeStruct((batch, length, 2 + self.patch_dim), jnp.float32)

    def input_flops(self, length: int) -> float:
        """The projection of N patches."""
        return 2 * length * self.patch_dim * self.emb_dim


PRESETS = {
    "pix2struct_base": Pix2StructConfig(50244, **sizes(768, 12, 12, 12, 2048)),
    "pix2struct_large": Pix2StructConfig(50244, **sizes(1536, 24, 18, 18, 3968)),
    "pix2struct_tiny": Pix2StructConfig(  # bundled
        384, num_positions=128, **sizes(128, 2, 4, 2, 384)
    ),
}
TINY = Pix2StructConfig(  # for tests and examples
    20,
    relpos_num_buckets=8,
    relpos_max_distance=16,
    patch_size=2,
    num_positions=16,
    **sizes(16, 2, 2, 1, 24, head_dim=8),
)
