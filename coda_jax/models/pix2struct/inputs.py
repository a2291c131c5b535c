"""Images for Pix2Struct: random patches, requests of `coda predict`, what a checkpoint says."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax import checks, files, hub
from coda_jax.models import preprocessing
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


def of_checkpoint(inputs: Inputs, directory: Path, config: Pix2StructConfig) -> Inputs:
    """The most patches that a checkpoint's own files say, and whether it answers questions."""
    fields, source = preprocessing.read(directory, _USED, _FIXED)
    sides = fields.get("patch_size", config.patch_size)
    sides = sides if isinstance(sides, Mapping) else {"height": sides, "width": sides}
    if {**sides} != dict.fromkeys(("height", "width"), config.patch_size):
        raise ValueError(f"{source}: patch_size={sides} is not config.json's {config.patch_size}")
    longest = checks.COUNT(f"{source}: max_patches", fields.get("max_patches", inputs.longest))
    if "is_vqa" not in fields and (directory / _CONFIG).is_file():
        source = str(directory / _CONFIG)
        fields = files.read_json(source, hub.MAX_JSON_BYTES)
    asked = checks.flag(f"{source}: is_vqa", fields.get("is_vqa") or False)

    def read(path: str) -> Iterator[dict[str, str]]:
        for number, request in enumerate(inputs.read(path)):
            if not request.get("header", "").strip():
                raise ValueError(
                    f"input {number} (the first is 0) of {path} has no question, which this "
                    f'checkpoint needs ({source}: is_vqa): lines {{"image": ..., "header": ...}}'
                )
            yield request

    return dataclasses.replace(inputs, longest=longest, read=read if asked else inputs.read)


_CONFIG = "config.json"
_USED = {"is_vqa", "max_patches", "patch_size"}
_FIXED = {"do_normalize": (True,), "do_convert_rgb": (True,)}
INPUTS = Inputs(
    "patches",
    random_patches,
    read_images,
    encoder,
    shown,
    longest=2048,
    of_checkpoint=of_checkpoint,
)
