"""What a checkpoint says of how its inputs are prepared is done, or refused by name."""

import json

from command_line import coda
from helpers import TINY, TINY_IMAGES, TINY_SPEECH, config, random_params
import numpy as np
from PIL import Image
import pytest

from coda_jax import checkpoints
from coda_jax.commands.convert import convert
from coda_jax.commands.loading import load_model
from coda_jax.inference import Predictor
from coda_jax.models import inputs_of
from coda_jax.objectives import model_for

FILE = "preprocessor_config.json"
CONFIG = config(base=TINY_IMAGES, vocab_size=384, num_encoder_layers=1)
# As transformers 4 writes it.
PUBLISHED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "image_processor_type": "Pix2StructImageProcessor",
    "is_vqa": True,
    "max_patches": 9,
    "patch_size": {"height": 2, "width": 2},
    "processor_class": "Pix2StructProcessor",
}


@pytest.fixture(name="checkpoint", scope="module")
def fixture_checkpoint(tmp_path_factory):
    """A tiny Pix2Struct of bytes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save_hf(directory, CONFIG, random_params(CONFIG))
    return directory


@pytest.fixture(name="say")
def fixture_say(checkpoint):
    """A function that writes the file of the checkpoint, or fields of its config.json."""
    raw = (checkpoint / "config.json").read_text()

    def say(name=FILE, **fields):
        found = json.loads(raw) if name == "config.json" else {}
        (checkpoint / name).write_text(json.dumps(found | fields))

    yield say
    (checkpoint / "config.json").write_text(raw)
    for name in (FILE, "processor_config.json"):
        (checkpoint / name).unlink(missing_ok=True)


def predict(checkpoint, tmp_path, **line):
    """What `coda predict` answers to one image of 4 x 40 pixels."""
    Image.fromarray(np.arange(160, dtype=np.uint8).reshape(4, 40)).save(tmp_path / "a.png")
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": str(tmp_path / "a.png"), **line}))
    given = {
        "INITIAL_CHECKPOINT_PATH": checkpoint,
        "VOCABULARY": "bytes",
        "INPUT": tmp_path / "in.jsonl",
        "OUTPUT": tmp_path / "out.jsonl",
        "Decoding.max_decode_length": 4,
        "BATCH_SIZE": 2,
    }
    coda("predict", ["runs/predict.gin"], given)
    return json.loads((tmp_path / "out.jsonl").read_text())["prediction"]


@pytest.mark.parametrize("header", [{}, {"header": ""}, {"header": " \n"}])
def test_a_checkpoint_for_questions_refuses_images_without(checkpoint, say, tmp_path, header):
    say(**PUBLISHED)
    with pytest.raises(ValueError, match=r"in\.jsonl:1: .* has no question, .*preprocessor_config"):
        predict(checkpoint, tmp_path, **header)


def test_questions_are_asked_where_any_of_the_files_says_so(checkpoint, say, tmp_path):
    def asks():
        why = inputs_of(CONFIG, checkpoint).problem({"image": "a.png"})
        assert why is None or "has no question" in why
        return why is not None

    assert not asks()
    say("config.json", is_vqa=True)
    assert asks()
    say(**PUBLISHED | {"is_vqa": False})  # which goes before the config, as in transformers
    assert not asks()
    say("config.json", is_vqa=False)
    say(**PUBLISHED)
    assert asks()
    (checkpoint / FILE).unlink()
    say("processor_config.json", image_processor=PUBLISHED, processor_class="Pix2StructProcessor")
    assert asks()


def test_images_get_as_many_patches_as_the_checkpoint_says(checkpoint, say):
    assert load_model(str(checkpoint)).longest_inputs == 2048
    say(**PUBLISHED)
    assert load_model(str(checkpoint)).longest_inputs == 9


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"do_normalize": False}, "do_normalize=False is not handled"),
        ({"do_convert_rgb": False}, "do_convert_rgb=False is not handled"),
        ({"patch_size": {"height": 16, "width": 16}}, "patch_size=.* is not config.json's 2"),
        ({"patch_size": {"height": 2}}, "patch_size=.* is not config.json's 2"),
        ({"patch_size": 16}, "patch_size=.* is not config.json's 2"),
        ({"max_patches": 0}, "max_patches must be a whole number of at least 1"),
        ({"max_patches": "9"}, "max_patches must be a whole number"),
        ({"is_vqa": "yes"}, "is_vqa must be True or False"),
        ({"image_mean": [0.5]}, "unknown field image_mean"),
    ],
)
def test_what_is_not_done_is_refused(checkpoint, say, changed, named):
    say(**PUBLISHED | changed)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.*\n?.*{named}"):
        inputs_of(CONFIG, checkpoint)


def test_fields_that_change_nothing_and_those_of_newer_versions_are_read(checkpoint, say):
    """transformers 5 writes `null` for what it does not use."""
    say(**PUBLISHED | {"image_std": None, "data_format": "channels_first", "is_vqa": None})
    assert inputs_of(CONFIG, checkpoint).longest == 9


def test_a_converted_checkpoint_keeps_the_file(checkpoint, say, tmp_path):
    say(**PUBLISHED)
    convert(str(checkpoint), str(tmp_path / "new"), "hf")
    assert json.loads((tmp_path / "new" / FILE).read_text()) == PUBLISHED


def test_other_frames_of_speech_are_refused(tmp_path):
    speech = TINY_SPEECH.replace(feature_dim=160)
    published = {
        "feature_extractor_type": "SeamlessM4TFeatureExtractor", "feature_size": 80,
        "num_mel_bins": 80, "padding_side": "right", "padding_value": 1, "stride": 2,
        "processor_class": "Wav2Vec2BertProcessor", "return_attention_mask": True,
        "sampling_rate": 16000,
    }  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps(published))
    assert inputs_of(speech, tmp_path).longest == 1500
    for changed in ({"sampling_rate": 8000}, {"stride": 1}, {"num_mel_bins": 40}, {"fmax": 1}):
        (tmp_path / FILE).write_text(json.dumps(published | changed))
        with pytest.raises(ValueError, match=rf"{FILE} cannot be used:\n  .*{next(iter(changed))}"):
            inputs_of(speech, tmp_path)


def test_an_image_that_runs_past_the_positions_is_refused(checkpoint, tmp_path):
    """143 patches in a row, and 15 positions: the numbers would be NaN, the answer empty."""
    with pytest.raises(ValueError, match=r"has 143 columns of patches, and .* positions for 15: "):
        predict(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ((16, 1), "it has 16 rows of patches, and the model positions for 15"),
        ((1, 16), "it has 16 columns of patches, and the model positions for 15"),
        ((1, -1), "its rows and columns are not whole numbers from 1"),
        ((1.5, 1), "its rows and columns are not whole numbers from 1"),
        ((0, 1), "its patches are padding alone"),
    ],
)
def test_patches_without_a_place_are_refused(place, named):
    patches = np.zeros((1, 14), np.float32)
    patches[0, :2] = place
    with pytest.raises(ValueError, match=rf"input 0 .*: {named}"):
        list(Predictor(CONFIG, random_params(CONFIG))([patches]))
    if place[0]:  # a batch may be filled up with padding
        with pytest.raises(ValueError, match=f"row 1 of the inputs: {named}"):
            model = model_for(CONFIG)
            model.predict(random_params(CONFIG), np.stack([patches * 0, patches]))


@pytest.mark.parametrize("token", [-1, 20])
def test_ids_that_a_vocabulary_lacks_are_refused(token):
    """And not taken from the end of its table, or as NaN."""
    with pytest.raises(ValueError, match=rf"the id {token}, the model's are 0 to 19"):
        model_for(TINY).predict(random_params(TINY), np.array([[3, token, 1]]))
