"""Headers: what a font cannot draw is refused, and different questions are different pictures."""

import unicodedata

import numpy as np
from PIL import Image
import pytest

from coda_jax.data import headers, images

LACKED = {  # a question in each script that DejaVu Sans lacks, and one of its characters
    "Chinese": ("这是什么", "这"),
    "Japanese": ("これは何ですか", "こ"),
    "Korean": ("이것은 무엇", "이"),
    "Hindi": ("यह क्या है", "य"),
    "Thai": ("นี่คืออะไร", "น"),
    "control": ("a\x01b", r"U\+0001"),
    "half of a pair": ("a\ud83d", r"U\+D83D"),
}


@pytest.fixture(name="path")
def fixture_path(tmp_path):
    """An image file."""
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.mark.parametrize("script", LACKED)
def test_a_header_that_the_font_lacks_is_refused_and_its_characters_named(path, script):
    text, character = LACKED[script]
    with pytest.raises(ValueError, match=rf"a\.png': .*DejaVuSans\.ttf lacks: .*{character}"):
        images.read_image(path, text)


def test_headers_in_the_fonts_scripts_are_drawn_and_differ(path):
    """Latin, Greek, Cyrillic, Arabic, Hebrew, accents that are characters of their own, spaces."""
    questions = ["What?", "\u0422\u0438?", "\u03a4\u03b9;", "ما هذا", "מה זה", "é", "e\u0301a"]
    questions += ["a\u00a0b\tc", "a  b"]
    pictures = [images.read_image(path, question).tobytes() for question in questions]
    assert len({*pictures}) == len(questions)


def test_every_character_that_is_taken_has_a_glyph_of_its_own():
    """Of the Basic Multilingual Plane: what is not taken looks like what no font has."""
    font = headers._load(headers.DEFAULT_FONT)
    box = bytes(font.getmask("\uffff"))
    known = headers.characters(headers.DEFAULT_FONT)
    for character in map(chr, range(0x21, 0xFFFF, 97)):
        if character not in known and unicodedata.category(character)[0] == "L":
            assert bytes(font.getmask(character)) == box, ascii(character)
    for character in "Aя字":
        assert (bytes(font.getmask(character)) != box) == (character in known)


def test_what_is_no_font_or_no_header_is_named(path, tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    for font in (tmp_path / "font.ttf", tmp_path / "missing.ttf"):
        with pytest.raises(
            ValueError, match=rf"HEADER_FONT='.*{font.name}' is not the file of a font"
        ):
            images.read_image(path, "Who?", str(font))
    with pytest.raises(ValueError, match="the header has 10,001 characters; MAX_HEADER is 10,000"):
        images.read_image(path, "a" * 10_001)


def test_another_font_draws_what_the_default_lacks(path):
    """STIX has mathematical letters of the planes above the first that DejaVu Sans lacks."""
    text = next(
        chr(x) for x in range(0x1D400, 0x1D7FF)
        if chr(x) in headers.characters(_STIX) - headers.characters(headers.DEFAULT_FONT)
    )  # fmt: skip
    with pytest.raises(ValueError, match="lacks"):
        images.read_image(path, text)
    assert not np.array_equal(images.read_image(path, text, _STIX), images.read_image(path))


_STIX = headers.DEFAULT_FONT.replace("DejaVuSans.ttf", "STIXGeneral.ttf")
