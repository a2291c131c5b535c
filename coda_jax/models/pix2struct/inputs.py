"""Images for Pix2Struct: random patches, requests of `coda predict`, what a checkpoint says."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from coda_jax import checks, files, hub
from coda_jax.models import preprocessing
from coda_jax.models.base import Inputs
from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.optional import needs


def random_patches(
    config: Pix2StructConfig, rng: np.random.Generator, batch: int, length: int
) -> np.ndarray:
    """Patches [B, N, C] float32 of images that are about square."""
    patches = rng.standard_normal(config.input_spec(batch, length).shape, np.float32)
    side = math.ceil(length**0.5)
    patches[..., :2] = 1 + np.stack(np.divmod(np.arange(length), side), axis=-1)
    return patches


def problem(request: Mapping[str, Any]) -> str | None:
    """Why {"image", "header"}, which may lack a question as the latter, is no request."""
    header = request.get("header", "")
    return None if isinstance(header, str) else f"'header' must be a string: {header!r}"


def encoder(
    config: Pix2StructConfig, vocabulary: Any, max_length: int, font: str | None = None
) -> Callable[[Mapping[str, str]], np.ndarray]:
    """{"image", "header"} -> patches [n, C] of the image, scaled to at most `max_length`."""
    from coda_jax.data import headers, images  # which need more than other families have

    del vocabulary
    with needs():  # now, and not when the first image is read
        import tensorflow  # noqa: F401
    if font is not None:
        headers.check_font(font)

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

    def without_question(request: Mapping[str, Any]) -> str | None:
        if (found := problem(request)) is not None or request.get("header", "").strip():
            return found
        return (
            f"the image has no question, which this checkpoint needs ({source}: is_vqa): rows with "
            '"image" and "header"'
        )

    refused = without_question if asked else inputs.problem
    return dataclasses.replace(inputs, longest=longest, problem=refused)


_CONFIG = "config.json"
_USED = {"is_vqa", "max_patches", "patch_size"}
_FIXED = {"do_normalize": (True,), "do_convert_rgb": (True,)}
INPUTS = Inputs(
    "patches",
    random_patches,
    "image",
    encoder,
    shown,
    Path(__file__).with_name("served.py"),
    longest=2048,
    others=("header",),
    reads_files=True,
    problem=problem,
    of_checkpoint=of_checkpoint,
)
