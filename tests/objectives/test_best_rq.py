"""BEST-RQ: targets and spans against loops in numpy, and what the loss depends on."""

import functools

from helpers import TINY, TINY_SPEECH, config, random_frames, random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import trees
from coda_jax.methods import Full
from coda_jax.objectives import CTC, best_rq
from coda_jax.objectives.best_rq import HEAD, BestRQ, BestRQConfig
from coda_jax.training import steps

CONFIG = config({"reduction": 2}, base=TINY_SPEECH, num_encoder_layers=1, dropout_rate=0.0)
OPTIONS = BestRQConfig(num_codes=7, code_dim=3, start_probability=0.2, span=3)
LENGTHS = [30, 12, 0, 25]


@pytest.fixture(name="params", scope="module")
def fixture_params():
    """Of the network, and a head in which nothing is zero."""
    params = BestRQ(CONFIG, OPTIONS).add_leaves(random_params(CONFIG))
    params[HEAD]["bias"] = params[HEAD]["bias"] + np.linspace(-1, 1, 7, dtype=np.float32)
    return params


@functools.cache
def compiled(name):
    """A method of the model."""
    return jax.jit(getattr(BestRQ(CONFIG, OPTIONS), name))


def batch_of(frames):
    """A batch, as the trainer has it."""
    return {
        "encoder_input_tokens": frames,
        "decoder_target_tokens": np.ones((len(frames), 4), np.int32),
        "decoder_loss_weights": np.ones((len(frames), 4), np.int32),
    }


def test_targets_are_the_nearest_codes(rng):
    projection, codebook = best_rq.quantizer(jax.random.key(3), 6, 4, 9)
    features = rng.normal(size=(2, 5, 6)).astype(np.float32)
    features[1, 2] = 0  # silence
    found = jax.jit(best_rq.frame_targets)(features, projection, codebook)
    assert found.dtype == np.int32
    for row, frame in np.ndindex(2, 5):
        projected = features[row, frame].astype(np.float64) @ np.asarray(projection)
        projected /= max(np.linalg.norm(projected), 1e-30)
        codes = np.asarray(codebook, np.float64)
        distances = np.linalg.norm(
            codes / np.linalg.norm(codes, axis=1)[:, None] - projected, axis=1
        )
        if (row, frame) == (1, 2):
            assert found[row, frame] == 0
        else:
            assert found[row, frame] == distances.argmin()
    assert len(np.unique(found)) > 3


def test_the_codebook_is_of_the_seed_alone():
    same = BestRQ(CONFIG, OPTIONS), BestRQ(CONFIG.replace(dropout_rate=0.1), OPTIONS)
    np.testing.assert_array_equal(same[0].codebook, same[1].codebook)
    np.testing.assert_array_equal(same[0].projection, same[1].projection)
    other = BestRQ(CONFIG, BestRQConfig(num_codes=7, code_dim=3, seed=1))
    assert np.abs(other.codebook - same[0].codebook).max() > 0.1
    assert np.abs(other.projection - same[0].projection).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(other.codebook, axis=1), 1, rtol=1e-6)


def test_the_quantizer_has_the_papers_distributions():
    """Xavier-uniform, and directions that are spread evenly."""
    projection, codebook = best_rq.quantizer(jax.random.key(0), 160, 16, 8192)
    limit = np.sqrt(6 / (160 + 16))
    assert np.abs(projection).max() <= limit
    assert np.std(projection) == pytest.approx(limit / np.sqrt(3), rel=0.05)
    np.testing.assert_allclose(np.mean(codebook, axis=0), 0, atol=0.01)
    np.testing.assert_allclose(codebook.T @ codebook / 8192, np.eye(16) / 16, atol=0.005)


@pytest.mark.parametrize("span", [1, 3, 40])
def test_spans_cover_the_frames_after_their_starts(span, rng):
    starts = rng.random((6, 30)) < 0.1
    mask = np.arange(30) < np.array([30, 30, 20, 5, 0, 30])[:, None]
    found = jax.jit(best_rq.span_mask, static_argnums=1)(starts, span, mask)
    for row, frame in np.ndindex(6, 30):
        covered = starts[row, max(0, frame - span + 1) : frame + 1].any()
        assert found[row, frame] == (covered and mask[row, frame])


def test_as_much_is_masked_as_the_probability_says():
    """1 - (1 - p)^span of the frames, with noise of the deviation that is asked for."""
    model = BestRQ(CONFIG, BestRQConfig(num_codes=7))
    frames = np.ones((64, 400, 7), np.float32)
    found, there = jax.jit(model.masked)(frames, jax.random.key(1))
    assert there[:, 20:].mean() == pytest.approx(1 - 0.99**20, abs=0.02)
    noise = np.asarray(found[..., 1:])[np.asarray(there)]
    assert abs(noise.mean()) < 0.005 and noise.std() == pytest.approx(0.1, rel=0.02)
    assert (np.asarray(found)[~np.asarray(there)] == 1).all() and (found[..., 0] == 1).all()


def test_loss_is_the_cross_entropy_at_masked_frames_only(params, rng):
    frames = random_frames(rng, LENGTHS, 30)
    key = jax.random.key(5)
    _, sums = compiled("loss")(params, batch_of(frames), key)
    span_rng, _ = jax.random.split(key)
    masked, there = compiled("masked")(frames, span_rng)
    model = BestRQ(CONFIG, OPTIONS)
    targets = best_rq.frame_targets(frames[..., 1:], model.projection, model.codebook)
    encoded = np.asarray(compiled("encode")(params, masked), np.float64)
    logits = encoded @ np.asarray(params[HEAD]["kernel"]) + np.asarray(params[HEAD]["bias"])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = [-log_probs[row, n, targets[row, n]] for row, n in np.argwhere(np.asarray(there))]
    assert len(losses) > 10
    np.testing.assert_allclose(sums.loss, np.sum(losses), rtol=1e-4)
    right = (logits.argmax(-1) == targets) & np.asarray(there)
    assert (sums.weight, sums.correct, sums.examples) == (len(losses), right.sum(), 3)


@pytest.mark.all
def test_targets_of_frames_that_are_not_masked_do_not_count(params, rng, monkeypatch):
    """Other targets there, and other transcripts, give the same loss; at masked frames another."""
    frames = random_frames(rng, LENGTHS, 30)
    key = jax.random.key(5)
    _, there = compiled("masked")(frames, jax.random.split(key)[0])
    real = best_rq.frame_targets

    @jax.jit
    def loss(where, value=0):
        def changed(*arguments):
            targets = real(*arguments)
            return jnp.where(where, (targets + 1) % 7, targets)

        monkeypatch.setattr(best_rq, "frame_targets", changed)
        batch = batch_of(frames) | {"decoder_target_tokens": jnp.full((4, 4), value)}
        return BestRQ(CONFIG, OPTIONS).loss(params, batch, key)[0]

    nowhere = loss(there & False)
    assert loss(~there, value=3) == nowhere
    assert abs(loss(there) - nowhere) > 1e-2


@pytest.mark.all
def test_loss_does_not_depend_on_padding_and_empty_rows(params, rng):
    """Invariant 2: neither on how long it is nor on what it holds."""
    frames = random_frames(rng, LENGTHS, 30)
    key = jax.random.key(5)
    _, sums = compiled("loss")(params, batch_of(frames), key)
    longer = np.pad(frames, ((0, 0), (0, 10), (0, 0)))
    longer[:, 30:, 1:] = 9.0
    _, padded = compiled("loss")(params, batch_of(longer), key)
    assert sums.weight == padded.weight > 10
    np.testing.assert_allclose(padded.loss, sums.loss, rtol=1e-5)


def test_each_step_has_spans_of_its_own_and_evaluation_always_the_same(params, rng):
    batch = batch_of(random_frames(rng, LENGTHS, 30))
    loss = compiled("loss")
    assert loss(params, batch)[0] == loss(params, batch)[0]
    first, second = (loss(params, batch, jax.random.key(i))[0] for i in (1, 2))
    assert first != second


@pytest.mark.all
def test_training_learns_with_routing_and_leaves_the_head_of_ctc_alone(params, rng):
    """Through the trainer's step: the loss of masked frames falls, though dropout is off."""
    model = BestRQ(CONFIG.replace(methods=(*CONFIG.methods, Full())), OPTIONS)
    assert model.needs_rng and not CTC(CONFIG).needs_rng
    optimizer = optax.adamw(1e-2, weight_decay=0)
    trained, frozen = steps.partition(model, jax.tree.map(jnp.array, params))
    state = steps.TrainState(jnp.int32(0), trained, optimizer.init(trained))
    step = steps.make_train_step(model, optimizer, 1, 0)
    frames = np.repeat(random_frames(rng, [3] * 4, 3), 10, axis=1)  # what is near tells
    losses, weights = [], []
    for _ in range(40):
        state, sums = step(state, frozen, batch_of(frames))
        losses.append(float(sums.loss / sums.weight))
        weights.append(float(sums.weight))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert len(set(weights)) > 5
    for path, leaf in trees.flatten(params).items():
        same = np.array_equal(leaf, trees.flatten(state.trained)[path])
        assert same == path.startswith("ctc_head/"), path


def test_what_is_trained_with_adapters_alone(params):
    trained, frozen = steps.partition(BestRQ(CONFIG, OPTIONS), params)
    assert HEAD in trained and "router" in trained["encoder"]["layers_0"]
    assert "kernel" in frozen["encoder"]["layers_0"]["first_mlp"]["wi"]
    _, model_params = trees.split(params, BestRQ.creates)
    assert model_params.keys() == params.keys() - {HEAD}


def test_an_encoder_of_a_decoder_or_without_a_head_is_pretrained_too(params, rng):
    frames = random_frames(rng, LENGTHS, 30)
    headless = {name: leaf for name, leaf in params.items() if name != "ctc_head"}
    expected = compiled("loss")(params, batch_of(frames))[0]
    for cfg in (CONFIG.replace(vocab_size=0), CONFIG.replace(num_decoder_layers=1)):
        loss, _ = jax.jit(BestRQ(cfg, OPTIONS).loss)(headless, batch_of(frames))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["num_codes", "code_dim", "span", "start_probability"])
def test_options_that_mean_nothing_are_refused(name):
    with pytest.raises(ValueError, match=rf"BestRQConfig\.{name} must be .* got 0"):
        BestRQConfig(**{name: 0})


def test_models_and_batches_that_it_cannot_pretrain_are_refused():
    with pytest.raises(ValueError, match=r"'best_rq' is not for such a 't5'.*'seq2seq'"):
        BestRQ(TINY, OPTIONS)
    with pytest.raises(ValueError, match="pack=False"):
        BestRQ(CONFIG, OPTIONS).loss({}, {"encoder_segment_ids": np.ones((1, 3))})
