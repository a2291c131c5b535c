"""Images for Pix2Struct: random patches, requests of `coda predict`."""

from collections.abc import Callable, Iterator, Mapping
import math
from typing import Any

import numpy as np

from coda_jax.models.base import Inputs
from coda_jax.models.pix2struct.config import Pix2StructConfig


def random_patches(
    config: Pix2StructConfig, rng: np.random.Generator, batch: int, length: int
) -> np.ndarray:
    """Patches [B, N, C] float32 of images that are about square."""
    patches = rng.standard_normal(config.input_spec(batch, length).shape, np.float32)
    side = math.ceil(length**0.5)
    patches[..., :2] = 1 + np.stack(np.divmod(np.arange(length), side), axis=-1)
    return patches


def read_images(path: str) -> Iterator[dict[str, str]]:
    """The images of a list: {"image"}, with a question as "header"."""
    from coda_jax.data import images  # which needs more than other families have

    return iter(images.read_requests(path))


def encoder(
    config: Pix2StructConfig, vocabulary: Any, max_length: int, font: str | None = None
) -> Callable[[Mapping[str, str]], np.ndarray]:
    """{"image", "header"} -> patches [n, C] of the image, scaled to at most `max_length`."""
    from coda_jax.data import images

    del vocabulary

    def encode(record):
        image = images.read_image(record["image"], record.get("header", ""), font)
        return np.asarray(images.patches(image, max_length, config.patch_size))

    return encode


def shown(inputs: np.ndarray, vocabulary: Any) -> dict[str, Any]:
    """Patches [n, C] as the picture that they are of, in full contrast; see `Inputs.shown`."""
    del vocabulary
    rows, columns = grid = inputs[-1, :2].astype(int).tolist()
    size = math.isqrt((inputs.shape[1] - 2) // 3)
    patches = inputs[:, 2:].reshape(rows, columns, size, size, 3)
    image = patches.swapaxes(1, 2).reshape(rows * size, columns * size, 3)
    low, high = image.min(), image.max()
    image = np.rint(255 * (image - low) / max(high - low, 1e-6)).astype(np.uint8)
    return {"kind": "image", "image": image, "grid": grid}


INPUTS = Inputs("patches", random_patches, read_images, encoder, shown, longest=2048)
