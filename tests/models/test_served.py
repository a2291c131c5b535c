"""Inputs where coda_jax is not: those that the originals' own processors make."""

import runpy
import types

from helpers import GOLDEN
import numpy as np
from PIL import Image
import pytest
import soundfile

from coda_jax.models import FAMILIES


def read(family, line, longest, channels=()):
    """What the `served` of a family makes of a line."""
    module = runpy.run_path(str(FAMILIES[family].inputs.served))
    served = types.SimpleNamespace(longest=longest, channels=channels)
    served.manifest = {"vocabulary": {"eos_id": 1}}
    return module["read"](str(line), served, lambda text: [ord(letter) for letter in text])


def test_a_text_ends_with_the_end_marker_cut_or_not():
    assert read("t5", "abc", longest=4) == [97, 98, 99, 1]
    assert read("t5", "abcde", longest=4) == [97, 98, 99, 1]
    assert read("t5", "", longest=4) == [1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_patches_equal_the_golden_ones(mode, tmp_path):
    """Also of an image whose white is clear, with black behind it."""
    golden = np.load(GOLDEN / "pix2struct" / "patches.npz")
    image = Image.fromarray(golden["image"]).convert(mode)
    if mode == "RGBA":
        pixels = np.array(image)
        white = (pixels == 255).all(-1)
        pixels[white] = 0
        image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    longest, channels = golden["patches"].shape
    found = read("pix2struct", tmp_path / "image.png", longest, [channels])
    np.testing.assert_array_equal(found[:, :2], golden["patches"][:18, :2])
    np.testing.assert_allclose(found, golden["patches"][:18], atol=1e-3)


def test_frames_equal_the_golden_ones(tmp_path):
    golden = np.load(GOLDEN / "w2v_bert" / "features.npz")
    file = tmp_path / "recording.wav"
    soundfile.write(file, golden["samples"], 16000, subtype="FLOAT")
    found = read("wav2vec2-bert", file, longest=100)
    assert found.shape == (14, 161) and (found[:, 0] == 1).all()
    np.testing.assert_allclose(found[:, 1:], golden["features"], atol=1e-5)
    np.testing.assert_array_equal(read("wav2vec2-bert", file, longest=9), found[:9])


@pytest.mark.parametrize(("rate", "count"), [(8000, 16000), (16000, 300)])
def test_recordings_of_other_rates_and_too_short_ones_are_refused(rate, count, tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(count), rate)
    with pytest.raises(SystemExit, match=f"x.wav: must be of 16000 Hz and .* got {rate} Hz"):
        read("wav2vec2-bert", tmp_path / "x.wav", longest=9)
