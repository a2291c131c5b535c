"""Voices: every one says every digit, always the same, and the fallback does too."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from coda_jax.data.audio import SAMPLE_RATE
from coda_jax.tasks import voices

synthesised = pytest.mark.skipif(
    importlib.util.find_spec("py_nanotts") is None, reason="py-nanotts is not installed"
)
SPEAKERS = tuple(voices.Speaker(voice, 1.0, 1.0) for voice in voices.SPELLINGS)


@pytest.fixture
def without_synthesiser(monkeypatch):
    """As where py-nanotts has no wheel."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "py_nanotts" else find_spec(name)
    )
    voices.recordings.cache_clear()
    yield
    voices.recordings.cache_clear()


@synthesised
def test_every_voice_says_every_digit_in_its_own_way():
    recordings = voices.recordings(SPEAKERS)
    assert len(recordings) == len(SPEAKERS)
    for clips in recordings:
        assert len(clips) == 10
        for clip in clips:
            assert clip.dtype == np.float32
            assert 0.15 < len(clip) / SAMPLE_RATE < 0.8
            np.testing.assert_allclose(np.mean(clip**2), 1, rtol=1e-4)
    assert len({clip.tobytes() for clips in recordings for clip in clips}) == 60


@synthesised
def test_speed_and_pitch_are_heard():
    slow, fast = (voices.recordings((voices.Speaker("en-GB", 1.0, s),))[0][7] for s in (0.8, 1.25))
    assert 1.4 < len(slow) / len(fast) < 1.7

    def period(pitch):  # of the vowel in "five", in samples
        (clips,) = voices.recordings((voices.Speaker("en-GB", pitch, 1.0),))
        vowel = clips[5][len(clips[5]) // 3 :][:2000]
        correlation = np.correlate(vowel, vowel, mode="full")[len(vowel) - 1 :]
        return 60 + correlation[60:400].argmax()

    assert period(0.7) > 1.2 * period(1.3)


@pytest.mark.all
@synthesised
def test_clips_depend_neither_on_the_process_nor_on_what_was_said_before():
    """The synthesiser alone would read whatever its memory held: another allocator, other bits."""
    code = (
        "import sys\nfrom coda_jax.tasks import voices\nspeaker = voices.Speaker('en-GB', 1, 1)\n"
    )
    code += "clips = voices.recordings((speaker,))[0]\n"
    code += "sys.stdout.buffer.write(b''.join(clip.tobytes() for clip in clips))"
    environment = {**os.environ, "MALLOC_PERTURB_": "7", "MALLOC_MMAP_MAX_": "0"}
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE)
    others = voices.Speaker("it-IT", 1, 1), voices.Speaker("en-GB", 1, 1)
    clips = voices.recordings(others)[1]
    assert b"".join(clip.tobytes() for clip in clips) == result.stdout


def test_silence_around_a_digit_is_trimmed_and_no_more():
    tone = np.sin(np.arange(4000) / 5)
    clip = voices._trimmed(np.concatenate([np.zeros(3000), tone, np.zeros(5000)]))
    assert len(tone) <= len(clip) <= len(tone) + voices.MOMENT
    np.testing.assert_allclose(np.sum(np.square(clip, dtype=float)), len(clip), rtol=1e-4)


def test_without_the_synthesiser_speakers_are_captchas_voice_at_several_speeds(without_synthesiser):
    speakers = (voices.Speaker("en-GB", 1.0, 1.0), voices.Speaker("de-DE", 1.2, 1.25))
    with pytest.warns(UserWarning, match="py-nanotts is not installed"):
        normal, fast = voices.recordings(speakers)
    assert len(normal) == len(fast) == 10
    for one, other in zip(normal, fast, strict=True):
        np.testing.assert_allclose(len(one) / len(other), 1.5, rtol=0.05)
        np.testing.assert_allclose(np.mean(other**2), 1, rtol=1e-4)


def test_without_any_voices_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"coda_jax\[speech\]"):
        voices.recordings((voices.Speaker("en-GB", 9.0, 1.0),))
