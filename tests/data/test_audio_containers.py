"""A recording that ends early or is damaged is refused, whatever its format."""

import struct

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import soundfile

from coda_jax.data import audio, audio_containers

# Formats, subtypes of each that are read, and whether it has checksums.
KINDS = {
    "wav": ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM"),
    "rf64": ("PCM_16", "FLOAT"),
    "w64": ("PCM_16", "FLOAT"),
    "aiff": ("PCM_16", "PCM_24", "FLOAT", "ULAW"),
    "au": ("PCM_16", "FLOAT", "ALAW"),
    "caf": ("PCM_16", "DOUBLE", "ULAW"),
    "flac": ("PCM_16", "PCM_24", "PCM_S8"),
    "ogg": ("VORBIS", "OPUS"),
    "mp3": ("MPEG_LAYER_III",),
}
CASES = [(kind, subtype) for kind, subtypes in KINDS.items() for subtype in subtypes]
SAMPLES = 32_000


def sound(num_samples, channels=1):
    """A tone that rises, with some noise, so that every part of it differs."""
    time = np.arange(num_samples) / 16_000
    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time)
    tone = tone[:, None] + 0.01 * rng.normal(size=(num_samples, channels))
    return np.clip(tone, -1, 1)


def write(path, kind, subtype, channels=1, num_samples=SAMPLES):
    soundfile.write(path, sound(num_samples, channels), 16_000, subtype, format=kind.upper())
    return path.read_bytes()


@pytest.mark.parametrize(("kind", "subtype"), CASES)
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_recordings_are_read(tmp_path, kind, subtype, channels):
    """As they were, as far as the coding keeps them."""
    write(tmp_path / "a", kind, subtype, channels)
    found, expected = audio.read_audio(str(tmp_path / "a")), sound(SAMPLES, channels).mean(1)
    padding = 1152 if kind == "mp3" or subtype == "IMA_ADPCM" else 160 * (kind == "ogg")
    assert SAMPLES <= len(found) <= SAMPLES + padding
    if kind not in ("mp3", "ogg"):
        coarse = subtype in ("ULAW", "ALAW", "PCM_U8", "PCM_S8", "IMA_ADPCM")
        start = 50 * (subtype == "IMA_ADPCM")  # until its steps are as large as the sound
        np.testing.assert_allclose(
            found[start:SAMPLES], expected[start:], atol=0.06 if coarse else 1e-4
        )


@pytest.mark.parametrize(("kind", "subtype"), CASES)
def test_recordings_that_end_early_are_refused(tmp_path, kind, subtype):
    """At every fifth, one byte before the end, and at 37 others."""
    path = tmp_path / "a"
    content = write(path, kind, subtype)
    ends = {len(content) * fifth // 5 for fifth in range(5)} | {len(content) - 1}
    for end in sorted(ends | {len(content) * part // 37 for part in range(37)}):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"is not a readable audio file: ."):
            audio.read_audio(str(path))


def test_an_mp3_that_ends_between_two_frames_is_refused(tmp_path):
    """Its first frame says how many there are."""
    path = tmp_path / "a.mp3"
    content = write(path, "mp3", "MPEG_LAYER_III")
    end = audio_containers._mp3_frame(content, 0)
    for _ in range(9):
        end += audio_containers._mp3_frame(content, end)
    path.write_bytes(content[:end])
    with pytest.raises(ValueError, match=r"it ends early, or is damaged: 9 of \d+ frames"):
        audio.read_audio(str(path))


def test_an_mp3_with_tags_is_read(tmp_path):
    """ID3 before it, others behind, and the zeros that editors leave."""
    path = tmp_path / "a.mp3"
    content = write(path, "mp3", "MPEG_LAYER_III")
    expected = audio.read_audio(str(path))
    id3 = b"ID3\4\0\0" + bytes([0, 0, 1, 2]) + bytes(130)
    ape = struct.pack("<8sIIII8x", b"APETAGEX", 2000, 32, 0, 1 << 31 | 1 << 29)
    ape += struct.pack("<8sIIII8x", b"APETAGEX", 2000, 32, 0, 1 << 31)
    old = b"TAG" + bytes(125)
    for before, behind in ((id3, b""), (b"", old), (id3, ape + old)):
        path.write_bytes(before + content + behind)
        np.testing.assert_array_equal(audio.read_audio(str(path)), expected)
    path.write_bytes(content + bytes(50) + b"what is this?")
    with pytest.raises(ValueError, match="there is no frame at byte"):
        audio.read_audio(str(path))


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
def test_what_is_missing_in_the_middle_is_seen(tmp_path, kind):
    path = tmp_path / "a"
    content = write(path, kind, KINDS[kind][0])
    third = len(content) // 3
    path.write_bytes(content[:third] + content[2 * third :])
    with pytest.raises(ValueError, match=r"is not a readable audio file: ."):
        audio.read_audio(str(path))


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
@hypothesis.given(st.integers(0, 2**30), st.integers(1, 255))
@hypothesis.settings(max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))
def test_a_damaged_byte_is_seen_where_there_is_a_checksum(tmp_path, kind, place, change):
    """Or what is read is what was written: of headers not every byte concerns the samples."""
    path = tmp_path / "a"
    if not (tmp_path / "whole").exists():
        write(tmp_path / "whole", kind, KINDS[kind][0], num_samples=4_000)
    content = bytearray((tmp_path / "whole").read_bytes())
    content[place % len(content)] ^= change
    path.write_bytes(content)
    try:
        found = audio.read_audio(str(path))
    except ValueError as error:
        assert "is not a readable audio file: " in str(error) or "is too short" in str(error)
    else:
        np.testing.assert_array_equal(found, audio.read_audio(str(tmp_path / "whole")))


@pytest.mark.all
@pytest.mark.parametrize(("kind", "subtype"), CASES)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
def test_damaged_recordings_are_read_or_refused_by_name(tmp_path, kind, subtype, data):
    """Cut anywhere and changed in some places."""
    if not (tmp_path / "whole").exists():
        write(tmp_path / "whole", kind, subtype, num_samples=4_000)
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    (tmp_path / "a").write_bytes(content[: end if data.draw(st.booleans()) else None])
    try:
        found = audio.read_audio(str(tmp_path / "a"))
    except ValueError as error:
        assert str(tmp_path / "a") in str(error)
    else:
        assert np.isfinite(found).all() and len(found) >= audio.MIN_SAMPLES


def test_a_streamed_wav_is_read_up_to_its_end(tmp_path):
    """Its writer did not know how much was to come."""
    path = tmp_path / "a.wav"
    content = bytearray(write(path, "wav", "PCM_16"))
    expected = audio.read_audio(str(path))
    assert content[36:40] == b"data"
    for unknown in (b"\xff" * 4, bytes(4)):
        content[4:8], content[40:44] = unknown, b"\xff" * 4
        path.write_bytes(content)
        np.testing.assert_array_equal(audio.read_audio(str(path)), expected)


def header(rate=16_000, data=2**20):
    """The header of a WAV."""
    head = b"RIFF" + struct.pack("<I", 36 + data) + b"WAVEfmt "
    head += struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return head + b"data" + struct.pack("<I", data)


@pytest.mark.parametrize("rate", [0, 1, 999, 384_001, 20_000_003, 2**31 - 1])
def test_rates_have_limits(tmp_path, rate):
    path = tmp_path / "a.wav"
    path.write_bytes(header(rate, 4000) + bytes(4000))
    text = "is not a readable" if rate in (0, 2**31 - 1) else rf"{rate:,} Hz; MIN_RATE is 1,000"
    with pytest.raises(ValueError, match=text):
        audio.read_audio(str(path))


def test_lengths_have_limits_before_there_is_memory_for_them(tmp_path):
    """A FLAC that claims 2^36 samples; a WAV with many; one with few that become many."""
    path = tmp_path / "a"
    content = bytearray(write(path, "flac", "PCM_16"))
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"68,719,476,735 samples .* MAX_SAMPLES is 33,554,432"):
        audio.read_audio(str(path))
    for rate, count in ((16_000, 2**25 + 1), (1_000, 2**21 + 1_000)):
        with open(path, "wb") as file:
            file.write(header(rate, 2 * count))
            file.truncate(44 + 2 * count)
        with pytest.raises(ValueError, match=rf"{count:,} samples a channel at {rate:,} Hz; MAX_"):
            audio.read_audio(str(path))


@pytest.mark.parametrize("value", [1e300, -1e39, np.inf, np.nan])
def test_samples_that_float32_does_not_have_are_refused(tmp_path, value):
    samples = sound(4000)
    samples[2000] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, "DOUBLE")
    with pytest.raises(ValueError, match=r"a\.wav' has samples that are not finite"):
        audio.read_audio(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("kind", ["avr", "voc", "paf", "svx", "ircam", "nist", "mat4", "htk"])
def test_other_containers_are_refused(tmp_path, kind):
    """Nothing says whether they are whole."""
    soundfile.write(tmp_path / "a", sound(4000), 16_000, format=kind.upper())
    with pytest.raises(ValueError, match="it is none of WAV, RF64, "):
        audio.read_audio(str(tmp_path / "a"))
