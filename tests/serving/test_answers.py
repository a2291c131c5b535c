"""What a model says over HTTP is what it says to `Predictor`, whoever else asks."""

import base64
import io
import json
import os
import signal
import subprocess
import sys

from command_line import flags
from helpers import TINY_IMAGES, TINY_SPEECH, adapted_params, config, random_params
import numpy as np
import pytest
from running_server import LONGEST, running

from benchmarks import serve_load
from coda_jax import bundled
from coda_jax.commands.serve import serve
from coda_jax.data.audio import FEATURE_DIM
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.models import FAMILIES, inputs_of
from coda_jax.objectives import model_for
from coda_jax.serving.answers import described, embedded, generated
from coda_jax.serving.reading import Reader, Refused

CONFIG = config({"reduction": 2.0}, vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
DECODING = Decoding(max_input_length=48, max_decode_length=6, batch_size=4)
VOCABULARY = ByteVocabulary()
TEXTS = ["fade", "a longer input than others are", "b", "x" * 40, "", "dead beef"]


def reader_of(cfg, names, longest, inputs=None):
    inputs = inputs or FAMILIES[cfg.family].inputs
    encode = inputs.encoder(cfg, VOCABULARY, longest)
    return Reader(inputs, encode, model_for(cfg).expects, longest, names, max_rows=64)


def predictor_of(longest, batch_size):
    """With two adapters."""
    base = random_params(CONFIG.dense())
    kernel = np.array(base["decoder"]["logits_dense"]["kernel"])
    kernel[:, [*range(100), *range(126, 384)]] *= 0.01  # it writes letters
    base["decoder"]["logits_dense"]["kernel"] = kernel * 3
    adapters = {x: (CONFIG, adapted_params(CONFIG, base, seed=i)) for i, x in enumerate("ab", 1)}
    decoding = Decoding(max_input_length=longest, max_decode_length=6, batch_size=batch_size)
    return Predictor(CONFIG.dense(), base, decoding, adapters=adapters)


@pytest.mark.parametrize(
    ("longest", "batch_size", "programs"),
    [(32, 2, 1), pytest.param(48, 4, 2 * 2, marks=pytest.mark.all)],
)
def test_rows_of_several_clients_are_what_each_is_alone(longest, batch_size, programs):
    """All at once, with two adapters and of two lengths; nothing is compiled for them."""
    predictor = predictor_of(longest, batch_size)
    texts = [text for text in TEXTS if len(text) < longest]
    asked = [(text, name) for text in texts for name in "ab"]
    answers = generated(predictor, CONFIG, VOCABULARY)
    reader = reader_of(CONFIG, ["a", "b"], longest)
    with running(answers, names=["a", "b"], reader=reader, wait=0.05) as server:
        assert predictor.num_programs == programs  # of a length, and of 2 rows or 4
        found = [server.ask_later({"inputs": t, "adapter": n}) for t, n in asked]
        server.until(lambda: all(found))
        assert predictor.num_programs == programs
    for (text, name), [(status, value, _)] in zip(asked, found, strict=True):
        inputs = [np.array([*VOCABULARY.encode(text), 1])]
        ((_, tokens, scores),) = predictor.candidates(inputs, adapters=[name])
        (answer,) = value["answers"]
        assert status == 200 and answer["prediction"] == VOCABULARY.decode(tokens[0].tolist())
        assert answer["score"] == pytest.approx(float(scores[0]), rel=1e-4)
    texts = {value["answers"][0]["prediction"] for [(_, value, _)] in found}
    assert len(texts) > 4  # inputs and adapters tell


@pytest.mark.all
def test_several_outputs_and_draws():
    decoding = Decoding(
        max_input_length=48, max_decode_length=6, batch_size=4, do_sample=True,
        num_return_sequences=2,
    )  # fmt: skip
    drawing = Predictor(CONFIG.dense(), random_params(CONFIG.dense()), decoding)
    answers = generated(drawing, CONFIG, VOCABULARY)
    inputs = [np.array([*VOCABULARY.encode("fade"), 1])]
    first, again = (dict(answers(inputs, None))[0] for _ in range(2))
    assert len(first["predictions"]) == 2
    assert first["prediction"] == first["predictions"][0]["text"]
    assert first != again  # a request draws anew


@pytest.mark.all
def test_labels_numbers_and_embeddings():
    encoder = config(base=FAMILIES["t5"].tiny.encoder_only(), vocab_size=384)
    for head, labels in (("classification", ("yes", "no")), ("regression", ())):
        cfg = encoder.replace(head=head, labels=labels, pooling="mean")
        params = random_params(cfg)
        answers = described(Encodings(cfg, params, DECODING), cfg, DECODING)
        with running(answers, reader=reader_of(cfg, None, 48)) as server:
            (answer,) = server.ask({"inputs": "fade"})[1]["answers"]
        inputs = np.array([[*VOCABULARY.encode("fade"), 1]])
        expected = np.asarray(model_for(cfg).predict(params, inputs))[0]
        if labels:
            assert answer["prediction"] == labels[expected.argmax()]
            assert sum(answer["scores"].values()) == pytest.approx(1)
        else:
            assert answer["prediction"] == pytest.approx(float(expected[0]), rel=1e-4)
    params = random_params(encoder)
    answers = embedded(Encodings(encoder, params, DECODING, "mean"), encoder, DECODING)
    with running(answers, reader=reader_of(encoder, None, 48)) as server:
        (answer,) = server.ask({"inputs": "fade"})[1]["answers"]
    expected = np.asarray(model_for(encoder).encode(params, inputs)).mean(1)[0]
    np.testing.assert_allclose(answer["embedding"], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(name="picture", scope="module")
def fixture_picture():
    """The content of a PNG."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(name="recording", scope="module")
def fixture_recording():
    """The content of a WAV of half a second."""
    import soundfile

    file = io.BytesIO()
    samples = np.random.default_rng(0).normal(size=8000) * 0.1
    soundfile.write(file, samples, 16000, format="WAV")
    return file.getvalue()


@pytest.mark.all
@pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
@pytest.mark.parametrize(
    ("cfg", "field", "content", "others"),
    [
        (TINY_IMAGES, "image", "picture", {"header": "What is it?"}),
        (TINY_SPEECH.replace(feature_dim=FEATURE_DIM), "audio", "recording", {}),
    ],
    ids=["image", "audio"],
)
def test_a_file_in_a_request_is_what_the_file_is_on_a_disk(
    cfg, field, content, others, start, request, tmp_path
):
    content = request.getfixturevalue(content)
    reader = reader_of(cfg, None, LONGEST)
    text = start + base64.b64encode(content).decode()
    asked = reader.asked(json.dumps({field: [text, text], **others}).encode())
    found = reader.inputs(asked.rows)
    (tmp_path / "file").write_bytes(content)
    encode = FAMILIES[cfg.family].inputs.encoder(cfg, VOCABULARY, LONGEST)
    expected = encode({field: str(tmp_path / "file"), **others})
    assert len(found) == 2
    for values in found:
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("family", "field", "given", "status", "said"),
    [
        ("pix2struct", "image", "/etc/hostname", 400, "'image' must be the content of a file"),
        ("pix2struct", "image", "ä", 400, "'image' must be the content of a file in base64"),
        ("pix2struct", "image", "AAAA", 422, "'image' is not a readable image: it is none of"),
        ("pix2struct", "image", "", 422, "'image' is not a readable image"),
        ("wav2vec2-bert", "audio", "AAAA", 422, "'audio' is not a readable audio file"),
        ("wav2vec2-bert", "audio", "", 422, "'audio' is not a readable audio file: it is empty"),
    ],
)
def test_what_is_no_file_is_refused_and_no_path_is_told(family, field, given, status, said):
    reader = reader_of(FAMILIES[family].tiny, None, LONGEST)
    with pytest.raises(Refused) as refused:
        reader.inputs([{field: given}])
    assert refused.value.status == status and said in refused.value.why
    assert "/" not in refused.value.why.replace(given, "")


def test_a_question_that_a_checkpoint_needs_is_asked_for(tmp_path):
    cfg = FAMILIES["pix2struct"].tiny
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"is_vqa": True}))
    reader = reader_of(cfg, None, LONGEST, inputs_of(cfg, tmp_path))
    with pytest.raises(Refused, match="the image has no question") as refused:
        reader.asked(b'{"image": "AAAA"}')
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 70_000}, "PORT must be"),
        ({"host": ""}, "HOST must be"),
        ({"max_rows": 0}, "MAX_ROWS must be"),
        ({"max_body": "large"}, "MAX_BODY must be"),
        ({"max_wait_ms": -1}, "MAX_WAIT_MS must be"),
        ({"max_rows": 64, "max_queue": 8}, "MAX_QUEUE=8 has no places for MAX_ROWS=64 rows"),
    ],
)
def test_what_limits_cannot_be_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        serve(None, DECODING, **options)


@pytest.mark.all
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_asked_to_stop_ends_with_0(number):
    given = {"INITIAL_CHECKPOINT_PATH": bundled.DENSE, "PORT": 0, "BATCH_SIZE": 2}
    given |= {"Decoding.max_input_length": 32, "Decoding.max_decode_length": 4}
    command = [sys.executable, "-m", "coda_jax.cli", "serve", *flags(["runs/serve.gin"], given)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        for line in process.stderr:
            if "ready after" in line:
                break
        os.kill(process.pid, number)
        rest, errors = process.communicate(timeout=60)
    assert (rest, process.returncode) == ("", 0), errors


@pytest.mark.all
def test_200_clients_get_their_own_answers(tmp_path):
    report = tmp_path / "report.json"
    small = ["--batch_size=8", "--input_length=64", "--texts=40"]
    serve_load.main(["--clients=200", "--seconds=15", *small, f"--json={report}"])
    found = json.loads(report.read_text())
    assert found["rows"] > 0 and found["exit_code"] == 0
    assert not found["wrong"] and not found["lost"] and not found["refused"]
