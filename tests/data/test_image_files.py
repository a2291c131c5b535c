"""Image files are read as a person sees them, or refused by name."""

import io
import struct
import zlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from coda_jax.data import images

INK, PAPER = 5_000, 60_000  # of 16 bits
CORNERS = np.array([[0, 255, 255], [255, 255, 255]], np.uint8)  # dark at the upper left alone


def png(path, rows, depth, kind, **chunks):
    """Writes a PNG by its specification: rows of bytes, bits of a sample, type of its colours."""
    height, width = len(rows), len(rows[0]) * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in {"IHDR": header, **chunks, "IDAT": pixels, "IEND": b""}.items():
        part = name.encode() + data
        content += struct.pack(">I", len(data)) + part + struct.pack(">I", zlib.crc32(part))
    path.write_bytes(content)
    return str(path)


def grey(path):
    """The picture in a file, which has no colours."""
    found = images.read_image(str(path))
    assert found.ndim == 3 and (found == found[..., :1]).all()
    return found[..., 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp", "avif"])
def test_a_picture_stands_upright(tmp_path, kind, orientation):
    """The file holds it as a camera that was turned does, with EXIF's note of how."""
    upright = Image.fromarray(np.kron(CORNERS, np.ones((16, 16), np.uint8)))
    turned = {  # what undoes the turn that EXIF's number asks for
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif, quality=95)
    found = images.read_image(str(tmp_path / f"a.{kind}"))[8::16, 8::16]
    np.testing.assert_allclose(found.mean(-1), CORNERS, atol=8)


def sixteen_bits(tmp_path):
    """Files of ink and paper of 16 bits, {name: file}."""
    values = np.array([[INK, PAPER], [PAPER, INK]], np.uint16)
    for kind in ("png", "tiff", "jp2"):
        Image.fromarray(values).save(tmp_path / f"a.{kind}")
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + values.astype(">u2").tobytes())
    text = " ".join(map(str, values.ravel()))
    (tmp_path / "plain.pgm").write_text(f"P2 2 2 65535\n{text}\n")
    inverted = io.BytesIO()
    Image.fromarray(65535 - values).save(inverted, "tiff")
    content = inverted.getvalue().replace(*(struct.pack("<HHIHxx", 262, 3, 1, x) for x in (1, 0)))
    (tmp_path / "white_is_zero.tiff").write_bytes(content)
    colours = np.repeat(values[..., None], 3, -1).astype(">u2")
    png(tmp_path / "rgb.png", [row.tobytes() for row in colours], 16, 2)
    ink = np.stack([values, np.full_like(values, 65535)], -1).astype(">u2")
    png(tmp_path / "la.png", [row.tobytes() for row in ink], 16, 4)
    return [path for path in tmp_path.iterdir() if path.suffix in (".png", ".tiff", ".jp2", ".pgm")]


def test_of_16_bits_the_upper_8_are_kept(tmp_path):
    """Ink of 5,000 on paper of 60,000: 19 on 234, and not 255 everywhere."""
    files = sixteen_bits(tmp_path)
    assert len(files) == 9
    for path in files:
        np.testing.assert_array_equal(grey(path), [[19, 234], [234, 19]], err_msg=path.name)


def test_of_12_bits_the_upper_8_are_kept(tmp_path):
    """Two samples in three bytes, as scanners write TIFF."""
    tags = [
        (256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8),
        (277, 3, 1), (278, 4, 1), (279, 4, 3),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = b"II*\0" + struct.pack("<I", 12) + bytes([0x13, 0x8E, 0xA0]) + b"\0"
    content += struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tiff").write_bytes(content)
    np.testing.assert_array_equal(grey(tmp_path / "a.tiff"), [[0x13, 0xEA]])


def transparent(tmp_path):
    """Files of black ink at the upper left on nothing, by what says that it is nothing."""
    alpha = 255 - CORNERS  # opaque where it is dark
    black = Image.new("RGB", (3, 2))
    black.putalpha(Image.fromarray(alpha))
    for name in ("rgba.png", "rgba.tiff", "rgba.webp"):
        black.save(tmp_path / name, lossless=True)
    black.convert("LA").save(tmp_path / "la.png")
    index = (CORNERS // 255).tolist()
    png(tmp_path / "p.png", index, 8, 3, PLTE=bytes(6), tRNS=b"\xff\0")
    png(tmp_path / "l.png", index, 8, 0, tRNS=b"\0\1")
    png(
        tmp_path / "rgb.png",
        [[x for x in row for _ in "rgb"] for row in index],
        8,
        2,
        tRNS=b"\0\1" * 3,
    )
    wide = [[0, 0, 0, 1, 0, 1], [0, 1] * 3]
    png(tmp_path / "i16.png", wide, 16, 0, tRNS=b"\0\1")
    for name in ("gif", "cut.gif"):
        frame = Image.fromarray(CORNERS // 255, "P")
        frame.putpalette(bytes(6))
        frame.save(tmp_path / name, "gif", transparency=1)
    return sorted(tmp_path.iterdir())


def test_what_is_transparent_is_white(tmp_path):
    """And not black as the ink is."""
    files = transparent(tmp_path)
    for path in files:
        np.testing.assert_array_equal(grey(path), CORNERS, err_msg=path.name)


@pytest.mark.parametrize(("depth", "row", "clear"), [(1, 0x60, 0), (2, 0x1B, 1), (4, 0x37, 3)])
def test_a_transparent_grey_of_few_bits_is_white(tmp_path, depth, row, clear):
    """A PNG says it in its own shades, which are 255 / (2^bits - 1) apart."""
    path = png(tmp_path / "a.png", [[row]], depth, 0, tRNS=struct.pack(">H", clear))
    shades = [row >> (8 - depth * (i + 1)) & (2**depth - 1) for i in range(8 // depth)]
    expected = [255 if shade == clear else shade * 255 // (2**depth - 1) for shade in shades]
    np.testing.assert_array_equal(grey(path)[0], expected)


def test_half_of_a_colour_is_half_of_it_on_white(tmp_path):
    Image.new("RGBA", (1, 1), (200, 0, 100, 51)).save(tmp_path / "a.png")
    (found,) = images.read_image(str(tmp_path / "a.png"))[0]
    np.testing.assert_allclose(found, np.array([200, 0, 100]) * 0.2 + 255 * 0.8, atol=1)


def test_pixels_of_one_bit_and_of_cmyk_are_read(tmp_path):
    for name in ("a.png", "a.tiff", "a.bmp", "a.gif", "a.pbm"):
        Image.fromarray(CORNERS).convert("1").save(tmp_path / name)
        np.testing.assert_array_equal(grey(tmp_path / name), CORNERS, err_msg=name)
    Image.fromarray(CORNERS).convert("1").save(tmp_path / "fax.tiff", compression="group4")
    np.testing.assert_array_equal(grey(tmp_path / "fax.tiff"), CORNERS)
    for name in ("a.jpg", "a.tiff"):
        Image.new("CMYK", (8, 8), (0, 0, 0, 204)).save(tmp_path / name, quality=95)
        np.testing.assert_allclose(grey(tmp_path / name), 51, atol=1)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def frames(path, kind, **options):
    first, second = Image.new("L", (4, 4)), Image.new("L", (4, 4), 255)
    first.save(path, kind, save_all=True, append_images=[second], **options)


def test_what_has_no_certain_picture_is_refused(tmp_path):
    path = tmp_path / "a.png"

    def refused(text):
        with pytest.raises(ValueError, match=rf"a\.png' is not a readable image: .*{text}"):
            images.read_image(str(path))

    path.write_bytes(EPS)
    refused("none of AVIF, BMP")
    for kind in ("pcx", "tga", "ico", "ppm", "sgi"):
        Image.new("RGB", (16, 16)).save(path, kind)
        if kind == "ppm":
            assert images.read_image(str(path)).shape == (16, 16, 3)
        else:
            refused("none of AVIF, BMP")
    for kind in ("gif", "png", "webp", "tiff"):
        frames(path, kind)
        refused("2 frames or pages")
    for mode in ("F", "I"):
        Image.new(mode, (4, 4)).save(path, "tiff")
        refused(f"mode '{mode}', have no known white")
    png(path, [bytes(6)], 16, 2, tRNS=bytes(6))
    refused("16 bits a colour, one of which is transparent")


def test_previews_beside_a_picture_are_no_pages(tmp_path):
    preview = Image.fromarray(CORNERS).resize((2, 2))
    preview.encoderinfo = {"tiffinfo": {254: 1}}  # NewSubfileType: of less resolution
    Image.fromarray(CORNERS).save(tmp_path / "a.tiff", save_all=True, append_images=[preview])
    assert Image.open(tmp_path / "a.tiff").n_frames == 2
    np.testing.assert_array_equal(grey(tmp_path / "a.tiff"), CORNERS)
    frames(tmp_path / "a.jpg", "MPO")
    assert grey(tmp_path / "a.jpg").max() < 5


def test_sizes_have_limits_before_there_is_memory_for_them(tmp_path):
    """Files of a few bytes, whose headers claim what nobody could hold."""
    path = tmp_path / "a.png"
    for size, text in (
        ((13_000, 13_000), r"13,000 x 13,000 pixels; MAX_PIXELS is 50,000,000"),
        ((1, 65_536), r"1 x 65,536 pixels; MAX_SIDE is 65,535"),
        ((100_000, 100_000), r"MAX_PIXELS is 50,000,000"),
        ((0, 3), r"no pixels|none of"),
    ):
        png(path, [b"\0"], 8, 0)
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", *size)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            images.read_image(str(path))
    png(path, [b"\0"] * 20_000, 8, 0)
    assert images.read_image(str(path)).shape == (20_000, 1, 3)
    with pytest.raises(ValueError, match=r"a\.png': with its header, as wide as .* MAX_SIDE"):
        images.read_image(str(path), "Who?")


def test_checksums_of_a_png_are_verified(tmp_path, rng):
    path = tmp_path / "a.png"
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for place in range(16, len(content) - 12):  # behind which is the end, without anything in it
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.png' is not a readable image"):
            images.read_image(str(path))


# {name: (format, options)}; a photo of 60 x 80.
KINDS = {
    **{kind: (kind, {}) for kind in ("png", "jpeg", "gif", "bmp", "ppm", "tiff", "webp", "avif")},
    "progressive": ("jpeg", {"progressive": True}),
    "lzw": ("tiff", {"compression": "tiff_lzw"}),
    "deflate": ("tiff", {"compression": "tiff_adobe_deflate"}),
    "lossless": ("webp", {"lossless": True}),
    "jpeg2000": ("jpeg2000", {}),
}


def photo(kind):
    """The bytes of a file."""
    slope = np.add.outer(np.arange(60), np.arange(80)) * 1.8
    noise = np.random.default_rng(0).normal(0, 9, (60, 80, 3))
    pixels = np.clip(slope[..., None] + noise, 0, 255).astype(np.uint8)
    name, options = KINDS[kind]
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, name, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_end_early_are_refused(tmp_path, kind):
    """At every fifth and 20 other places; of the last byte alone the picture may do without."""
    path, content = tmp_path / "a", photo(kind)
    path.write_bytes(content)
    whole = images.read_image(str(path))
    parts = {len(content) * part // 20 for part in range(20)}
    for end in sorted(parts | {len(content) * part // 5 for part in range(5)}):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="a' is not a readable image: "):
            images.read_image(str(path))
    path.write_bytes(content[:-1])
    try:
        np.testing.assert_array_equal(images.read_image(str(path)), whole)
    except ValueError as error:
        assert "a' is not a readable image: " in str(error)


@pytest.mark.all
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150, suppress_health_check=list(hypothesis.HealthCheck))
def test_damaged_images_are_read_or_refused_by_name(tmp_path, kind, data):
    """Changed in some places, of which many are in the header, and cut anywhere."""
    content = bytearray(photo(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        most = data.draw(st.sampled_from((60, len(content) - 1)))
        content[data.draw(st.integers(0, most))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    (tmp_path / "a").write_bytes(content[: end if data.draw(st.booleans()) else None])
    try:
        found = images.read_image(str(tmp_path / "a"))
    except ValueError as error:
        assert "a' is not a readable image: " in str(error)
    else:
        assert found.dtype == np.uint8 and found.shape[2] == 3 and found.size <= 3 * 50_000_000


@pytest.mark.all
@pytest.mark.parametrize("kind", ["png", "bmp", "ppm", "tiff", "webp", "gif"])
@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**30))
@hypothesis.settings(max_examples=40, suppress_health_check=list(hypothesis.HealthCheck))
def test_small_images_are_read_as_they_were(tmp_path, kind, height, width, seed):
    """Of few colours, which a palette holds."""
    pixels = np.random.default_rng(seed).integers(0, 3, (height, width, 3), dtype=np.uint8) * 127
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / "a", kind, **options)
    np.testing.assert_array_equal(images.read_image(str(tmp_path / "a")), pixels)
