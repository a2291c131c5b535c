"""Questions as pictures: a text drawn above an image, as Pix2Struct's public image processor does.

What a font cannot draw is refused: it would be the same box for every character, and different
questions the same picture.
"""

from collections.abc import Set
import functools
import math
import os
import textwrap

from coda_jax.data.image_files import check_size
from coda_jax.optional import needs

with needs("images"):
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

# The original draws headers in Arial, which is not free. A checkpoint that was trained with it is
# best served with a file of it.
DEFAULT_FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
HEADER_FONT_SIZE = 36
HEADER_MARGIN = 5
HEADER_COLUMNS = 80  # characters of a line
MAX_HEADER = 10_000  # characters: 125 lines, of which nothing can be read once they are patches
_SHOWN = 20  # characters that an error names


def with_header(image: Image.Image, header: str, font: str | None = None) -> Image.Image:
    """Puts a text above an image; the narrower of the two is scaled to the width of the other.

    Args:
        image: RGB.
        header: the text; it is wrapped into lines.
        font: a TrueType file; None for `DEFAULT_FONT`.

    Returns:
        The new image.

    Raises:
        ValueError: the text is longer than `MAX_HEADER`; the font is none, or lacks some of its
            characters; or both together are larger than an image may be.
    """
    text = draw_text(header, font)
    width = max(text.width, image.width)
    height = int(image.height * (width / image.width))
    header_height = int(text.height * (width / text.width))
    check_size(width, height + header_height, "with its header, as wide as the wider, it has")
    joined = Image.new("RGB", (width, height + header_height), "white")
    joined.paste(text.resize((width, header_height)), (0, 0))
    joined.paste(image.resize((width, height)), (0, header_height))
    return joined


def draw_text(text: str, font: str | None = None) -> Image.Image:
    """An image of a text, black on white, just large enough for it; see `with_header`."""
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header has {len(text):,} characters; MAX_HEADER is {MAX_HEADER:,}")
    lines = "\n".join(textwrap.wrap(text, HEADER_COLUMNS))
    loaded = _load(font or DEFAULT_FONT)
    _check_drawn(lines, font or DEFAULT_FONT)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), lines, font=loaded)
    width, height = (math.ceil(end) + 2 * HEADER_MARGIN for end in box[2:])
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((HEADER_MARGIN, HEADER_MARGIN), lines, fill="black", font=loaded)
    return image


def check_font(font: str) -> None:
    """Raises ValueError where a file is no font."""
    _load(font)


def _load(font: str) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(font, HEADER_FONT_SIZE)
    except (OSError, ValueError) as error:
        raise ValueError(f"HEADER_FONT={font!r} is not the file of a font: {error}") from error


@functools.lru_cache(maxsize=16)
def characters(font: str) -> Set[str]:
    """The characters that a font, a file, has."""
    return frozenset(map(chr, FT2Font(font).get_charmap()))


def _check_drawn(text: str, font: str) -> None:
    """Raises ValueError where the font lacks characters of a text."""
    lacking = sorted(set(text) - {"\n"} - characters(font))
    if lacking:
        shown = " ".join(x if x.isprintable() else f"U+{ord(x):04X}" for x in lacking[:_SHOWN])
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        raise ValueError(
            f"its header has characters that the font {font} lacks: {shown}{more}. Name a font "
            "that has them, as HEADER_FONT of the command or `font` of the task"
        )
