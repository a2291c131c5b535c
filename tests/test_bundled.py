"""The checkpoints and the vocabulary that come with the package."""

import jax
import numpy as np
import pytest
import seqio

from coda_jax import bundled, checkpoints
from coda_jax.commands.loading import load_model
from coda_jax.data import audio, images
from coda_jax.data.batches import batch_examples
from coda_jax.data.seqio_tasks import seqio_examples, seqio_vocabulary
from coda_jax.objectives import model_for
from coda_jax.sharding import Placement
from coda_jax.tasks import (  # noqa: F401 (offline registers tasks)
    offline,
    offline_images,
    offline_speech,
)
from coda_jax.training import trainer

TEXT = {"dense": bundled.DENSE, "coda": bundled.CODA}
IMAGES = {"dense images": bundled.DENSE_IMAGES, "coda images": bundled.CODA_IMAGES}
SPEECH = {"dense speech": bundled.DENSE_SPEECH, "coda speech": bundled.CODA_SPEECH}
FOLDERS = TEXT | IMAGES | SPEECH


@pytest.mark.parametrize("name", FOLDERS)
def test_each_is_small_and_has_a_card(name):
    folder = FOLDERS[name]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 10e6
    card = (folder / "README.md").read_text()
    for word in ("Data", "Steps", "Final loss", "Command", "Licence"):
        assert word in card


@pytest.mark.parametrize("name", TEXT)
def test_each_for_text_has_its_vocabulary(name):
    vocabulary = (bundled.VOCABULARY / "spiece.model").read_bytes()
    assert (TEXT[name] / "spiece.model").read_bytes() == vocabulary


def text_inputs(rng):
    inputs = rng.integers(3, 3000, (2, 20))
    return "T5ForConditionalGeneration", inputs, {"input_ids": inputs}


def image_inputs(rng):
    sheets = [offline_images.rendered_text("validation", i)[0] for i in range(2)]
    inputs = np.stack([images.patches(sheet, 256).numpy() for sheet in sheets])
    return "Pix2StructForConditionalGeneration", inputs, {"flattened_patches": inputs}


def speech_inputs(rng):
    recordings = [offline_speech.spoken_digits("spoken_digits", "test", i)[0] for i in range(2)]
    inputs = np.stack([audio.frames(samples)[:100] for samples in recordings])
    return "Wav2Vec2BertForCTC", inputs, {"input_features": inputs[..., 1:]}


@pytest.mark.parametrize(
    "name, make_inputs",
    [
        *((name, text_inputs) for name in TEXT),
        *((name, image_inputs) for name in IMAGES),
        *((name, speech_inputs) for name in SPEECH),
    ],
)
def test_each_loads_in_transformers(name, make_inputs, rng):
    torch = pytest.importorskip("torch", reason="the live comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="and transformers")
    config, params = checkpoints.load_hf(FOLDERS[name])
    family, inputs, theirs = make_inputs(rng)
    targets = rng.integers(3, 300, (2, 5))
    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    if name not in SPEECH:
        theirs["decoder_input_ids"] = decoder_inputs
    reference = getattr(transformers, family).from_pretrained(FOLDERS[name], dtype=torch.float32)
    with torch.no_grad():
        theirs = {name: torch.tensor(values) for name, values in theirs.items()}
        expected = reference.eval()(**theirs).logits.numpy()
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
    }
    found = model_for(config).logits(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def validation(task, lengths, count):
    """Batches of validation examples of a pretraining task."""
    examples = seqio_examples(
        task, "validation", feature_lengths=lengths, seed=0, shuffle=True, num_epochs=1
    )
    return list(
        batch_examples(
            (example for _, example in zip(range(count), examples, strict=False)),
            batch_size=32,
            feature_lengths=lengths,
        )
    )


def exact_match(model, params, batches):
    """How many are answered without a mistake."""
    return trainer.evaluate(model, params, batches, Placement())["exact_match"]


@pytest.mark.all
@pytest.mark.parametrize(
    "dense, coda, task, lengths, count",
    [
        (bundled.DENSE, bundled.CODA, "stdlib_summary", (128, 32), 96),
        (bundled.DENSE_IMAGES, bundled.CODA_IMAGES, "rendered_text", (256, 8), 32),
        (bundled.DENSE_SPEECH, bundled.CODA_SPEECH, "spoken_digits_clean", (200, 6), 32),
    ],
    ids=["text", "images", "speech"],
)
def test_both_know_what_they_were_taught_and_a_random_one_does_not(
    dense, coda, task, lengths, count, rng
):
    lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
    loaded = load_model(str(dense))
    routed = load_model(str(coda), adapter_checkpoint=str(coda / "adapter"))
    batches, model = validation(task, lengths, count), model_for(loaded.config)
    assert exact_match(model, loaded.params, batches) > 0.5
    assert exact_match(model_for(routed.config), routed.params, batches) > 0.5
    random = jax.tree.map(lambda x: rng.normal(0, x.std(), x.shape).astype(x.dtype), loaded.params)
    assert exact_match(model, random, batches[:1]) == 0


def test_the_vocabulary_has_as_many_ids_as_the_checkpoints():
    vocabulary = seqio_vocabulary(bundled.DENSE)
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    config, _ = checkpoints.load_hf(bundled.DENSE)
    assert vocabulary.vocab_size == config.vocab_size == 4096
