"""Image files as pictures: upright, of 8 bits a colour, on white paper.

A file is read as a person sees it, or it is refused: nothing is turned, clipped or made black by
how it is stored. Only formats that Pillow decodes itself are read. What a file claims is looked at
before its pixels are.
"""

from typing import BinaryIO
import warnings

import numpy as np

from coda_jax.optional import needs

with needs("images"):
    from PIL import Image, ImageOps, UnidentifiedImageError

# Others are left out: an EPS, whatever it is called, would start Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Of an image, its header included: an A4 page at 700 dots an inch, or the picture of a telephone.
# A pixel takes 4 bytes in Pillow, 3 as an array, and on the way to patches there are two copies.
MAX_PIXELS = 50_000_000
# Of a width or a height, as in JPEG: resizing takes memory for the width times the height that is
# to be.
MAX_SIDE = 65_535

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO, _SUBFILE = 258, 262, 0, 254  # of TIFF
_REDUCED, _MASK = 1, 4  # what a page is that is none of its own


def check_size(width: int, height: int, what: str) -> None:
    """Raises ValueError for more pixels than are read.

    Args:
        width: of the image.
        height: of the image.
        what: what has this size, for the error.
    """
    for name, most, found in (
        ("MAX_SIDE", MAX_SIDE, max(width, height)),
        ("MAX_PIXELS", MAX_PIXELS, width * height),
    ):
        if found > most:
            raise ValueError(f"{what} {width:,} x {height:,} pixels; {name} is {most:,}")


def read(path: str) -> Image.Image:
    """The picture in a file, RGB.

    Args:
        path: the file.

    Raises:
        ValueError: it is none of `FORMATS`, damaged or incomplete; it has more than one frame, or
            more than `MAX_PIXELS` pixels or `MAX_SIDE` in a row or column, or none; or its numbers
            have no known white.
    """
    try:
        # A file and no path: Pillow maps paths into memory, and garbles turned TIFFs.
        with open(path, "rb") as file:
            image = _opened(file)
            if image.format == "PNG":
                image.verify()  # the checksums, which are not looked at when pixels are read
            image = _opened(file)
            _check_single(image)
            _scale_transparency(image)
            ImageOps.exif_transpose(image, in_place=True)
            return _on_white(_of_8_bits(image))
    except UnidentifiedImageError as e:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from e
    except Image.DecompressionBombError as e:
        raise ValueError(f"MAX_PIXELS is {MAX_PIXELS:,}: {e}") from e
    except (ValueError, OSError):
        raise
    except Exception as e:  # decoders raise whatever comes up in damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e


def _opened(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is an error
        image = Image.open(file, formats=FORMATS)
    if 0 in image.size:
        raise ValueError(f"it has no pixels: its size is {image.size}")
    check_size(*image.size, "it has")
    return image


def _check_single(image: Image.Image) -> None:
    """Raises ValueError for animations and several pages, of which one alone would be seen."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return  # further pictures in a JPEG are previews, or the depth of the first
    if image.format == "TIFF":
        kinds = []
        for frame in range(1, image.n_frames):
            image.seek(frame)
            kinds.append(image.tag_v2.get(_SUBFILE, 0))
        image.seek(0)
        if all(kind & (_REDUCED | _MASK) for kind in kinds):
            return
    raise ValueError(f"it has {image.n_frames} frames or pages: save the one that is meant")


def _scale_transparency(image: Image.Image) -> None:
    """Makes the transparent colour of a PNG one of 8 bits, as Pillow makes its pixels."""
    clear = image.info.get("transparency")
    if image.format != "PNG" or not isinstance(clear, int | tuple):
        return
    kind = image.tile[0].args
    if kind in _LEVELS:
        image.info["transparency"] = clear * _LEVELS[kind]
    elif kind == "RGB;16B":
        raise ValueError("it has 16 bits a colour, one of which is transparent")


_LEVELS = {"L;2": 85, "L;4": 17}  # the distance of two shades of grey


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The image with at most 8 bits a colour; of 16 bits the upper 8 are kept, as of colours."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"its numbers, of Pillow's mode {image.mode!r}, have no known white")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    tags = getattr(image, "tag_v2", {})
    (bits,) = tags.get(_BITS_PER_SAMPLE, (16,))
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if (clear := image.info.get("transparency")) is not None:
        grey = np.where(values == clear, np.uint8(255), grey)
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with white wherever nothing covers it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    return paper
