"""The checkpoints and the vocabulary that come with the package."""

import numpy as np
import pytest
import seqio

from coda_jax import batches as batches_lib
from coda_jax import bundled, checkpoints, data, runs, training
from coda_jax.models import EncoderDecoder
from coda_jax.tasks import images, offline, offline_images  # noqa: F401 (register tasks)

TEXT = {"dense": bundled.DENSE, "coda": bundled.CODA}
IMAGES = {"dense images": bundled.DENSE_IMAGES, "coda images": bundled.CODA_IMAGES}
FOLDERS = TEXT | IMAGES


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


@pytest.mark.parametrize("name", FOLDERS)
def test_each_loads_in_transformers(name):
    torch = pytest.importorskip("torch", reason="the live comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="and transformers")
    config, params = checkpoints.load_hf(FOLDERS[name])
    rng = np.random.default_rng(0)
    if name in TEXT:
        family, argument = transformers.T5ForConditionalGeneration, "input_ids"
        inputs = rng.integers(3, 3000, (2, 20))
    else:
        family, argument = transformers.Pix2StructForConditionalGeneration, "flattened_patches"
        inputs = np.stack([images_patches(number) for number in range(2)])
    reference = family.from_pretrained(FOLDERS[name], dtype=torch.float32).eval()
    targets = rng.integers(3, 300, (2, 5))
    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    with torch.no_grad():
        expected = reference(
            **{argument: torch.tensor(inputs)}, decoder_input_ids=torch.tensor(decoder_inputs)
        ).logits.numpy()
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
    }
    found = EncoderDecoder(config).logits(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def images_patches(number):
    """The patches of a printed sheet."""
    image, _ = offline_images.rendered_text("validation", number)
    return images.patches(image, 256).numpy()


def exact_match(model, task, lengths, count=160):
    """Of validation examples of a pretraining task, how many are answered without a mistake."""
    examples = data.seqio_examples(
        task, "validation", feature_lengths=lengths, seed=0, shuffle=True, num_epochs=1
    )
    batches = batches_lib.batch_examples(
        (example for _, example in zip(range(count), examples, strict=False)),
        batch_size=32,
        feature_lengths=lengths,
    )
    metrics = training.evaluate(
        EncoderDecoder(model.config), model.params, batches, training.Placement()
    )
    return metrics["exact_match"]


@pytest.mark.parametrize(
    "dense, coda, task, lengths",
    [
        (bundled.DENSE, bundled.CODA, "stdlib_summary", {"inputs": 128, "targets": 32}),
        (
            bundled.DENSE_IMAGES,
            bundled.CODA_IMAGES,
            "rendered_text",
            {"inputs": 256, "targets": 8},
        ),
    ],
)
def test_both_know_what_they_were_taught_and_a_random_one_does_not(dense, coda, task, lengths):
    loaded = runs.load_model(str(dense))
    routed = runs.load_model(str(coda), adapter_checkpoint=str(coda / "adapter"))
    random = runs.load_model(config=loaded.config)
    assert exact_match(loaded, task, lengths) > 0.5
    assert exact_match(routed, task, lengths) > 0.5
    assert exact_match(random, task, lengths) == 0


def test_the_vocabulary_has_as_many_ids_as_the_checkpoints():
    vocabulary = data.load_vocabulary(bundled.DENSE)
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    config, _ = checkpoints.load_hf(bundled.DENSE)
    assert vocabulary.vocab_size == config.vocab_size == 4096
