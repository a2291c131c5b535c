"""`coda predict` for recordings."""

import functools
import json

from helpers import TINY_SPEECH, random_params
import jax
import numpy as np
import soundfile

from coda_jax.commands import predict
from coda_jax.commands.loading import LoadedModel
from coda_jax.data import audio
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.inference import Decoding
from coda_jax.objectives import CTC


def test_recordings_are_transcribed_one_line_each(tmp_path):
    """`coda predict` for a CTC model with random weights, which does not stay silent."""
    config = TINY_SPEECH.replace(vocab_size=384, feature_dim=160, num_encoder_layers=1)
    model = LoadedModel(config, random_params(config), None)
    for name, num_samples in (("a", 4000), ("b", 2000)):
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / 16000)
        soundfile.write(tmp_path / f"{name}.wav", tone, 16000)
    paths = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    (tmp_path / "files.txt").write_text("\n".join(paths))
    decoding = Decoding(batch_size=2, max_decode_length=20)
    predict.predict(
        model, str(tmp_path / "files.txt"), str(tmp_path / "out.jsonl"), decoding, "bytes"
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["audio"] for line in lines] == paths
    for path, line in zip(paths, lines, strict=True):
        frames = audio.frames(audio.read_audio(path)).numpy()[None]
        tokens = jax.jit(functools.partial(CTC(config).predict, max_decode_length=20))(
            model.params, np.pad(frames, ((0, 0), (0, 32 - frames.shape[1]), (0, 0)))
        )
        assert (np.asarray(tokens) > 0).sum() > 3
        assert line["prediction"] == ByteVocabulary().decode(tokens[0].tolist())
