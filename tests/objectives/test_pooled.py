"""Heads on the pooled outputs of an encoder alone."""

from helpers import TINY, config, random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.inference import Predictor
from coda_jax.objectives import model_for

CLASSES = {"head": "classification", "labels": ("a", "b", "c")}
NUMBER = {"head": "regression", "pooling": "first"}


def encoder_with(head, coda=None):
    return config(coda, base=TINY.encoder_only().replace(**head))


def batch(rng, targets, rows=4, length=9):
    inputs = rng.integers(2, TINY.vocab_size, (rows, length)).astype(np.int32)
    inputs[1, 5:] = 0
    weights = np.ones((rows, 1), np.int32)
    return {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets[:, None],
        "decoder_loss_weights": weights,
    }


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_classification_is_the_cross_entropy_of_a_linear_head_on_the_pooled_outputs(rng, pooling):
    cfg = encoder_with(CLASSES | {"pooling": pooling})
    params, model = random_params(cfg), model_for(cfg)
    given = batch(rng, np.array([0, 2, 1, 1], np.int32))
    given["decoder_loss_weights"][3] = 0
    encoded = np.asarray(model.encode(params, given["encoder_input_tokens"]), np.float64)
    real = given["encoder_input_tokens"] > 0
    pooled = {
        "first": encoded[:, 0],
        "mean": np.stack([x[keep].mean(0) for x, keep in zip(encoded, real, strict=True)]),
    }[pooling]
    logits = pooled @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(model.predict(params, given["encoder_input_tokens"]), logits, 1e-4)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss, sums = model.loss(params, given)
    expected = -log_probs[[0, 1, 2], [0, 2, 1]].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    right = logits[:3].argmax(-1) == [0, 2, 1]
    found = model.report(sums)
    assert found == {
        "loss": pytest.approx(expected / 3, rel=1e-4),
        "accuracy": pytest.approx(right.mean()),
    }


def test_regression_is_the_squared_error(rng):
    cfg = encoder_with(NUMBER)
    params, model = random_params(cfg), model_for(cfg)
    given = batch(rng, rng.normal(size=4).astype(np.float32))
    outputs = np.asarray(model.predict(params, given["encoder_input_tokens"]))
    assert outputs.shape == (4, 1)
    errors = outputs[:, 0] - given["decoder_target_tokens"][:, 0]
    loss, sums = model.loss(params, given)
    np.testing.assert_allclose(loss, (errors**2).sum(), rtol=1e-5)
    assert model.report(sums) == {
        "loss": pytest.approx((errors**2).mean(), rel=1e-5),
        "mean_absolute_error": pytest.approx(np.abs(errors).mean(), rel=1e-5),
    }


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(CLASSES, id="classification"),
        pytest.param(NUMBER, id="regression"),
    ],
)
@pytest.mark.all
def test_answers_depend_on_no_padding_and_gradients_reach_the_head(rng, head):
    cfg = encoder_with(head, {"reduction": 2.0})
    params, model = random_params(cfg), model_for(cfg)
    targets = np.array([0, 1, 1, 0], np.int32 if head is CLASSES else np.float32)
    given = batch(rng, targets)
    wider = np.pad(given["encoder_input_tokens"], ((0, 0), (0, 7)))
    predict = jax.jit(model.predict)
    short, long = predict(params, given["encoder_input_tokens"]), predict(params, wider)
    np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-5)
    gradients = jax.jit(jax.grad(lambda p: model.loss(p, given)[0]))(params)
    missing = [
        path
        for path, leaf in trees.flatten(gradients).items()
        if not jnp.any(leaf) and "key" not in path
    ]
    assert not missing


def test_what_a_head_must_have_is_said():
    with pytest.raises(ValueError, match="labels=\\(\\)"):
        encoder_with({"head": "classification"})
    with pytest.raises(ValueError, match="head='regression', labels="):
        encoder_with({"head": "regression", "labels": ("a", "b")})
    with pytest.raises(ValueError, match="num_decoder_layers=1"):
        TINY.replace(**CLASSES)
    with pytest.raises(ValueError, match=r"T5Config.pooling must be one of .* got 'max'"):
        encoder_with({"pooling": "max"})
    with pytest.raises(ValueError, match=r"may be \('classification',\)"):
        model_for(encoder_with(CLASSES), "seq2seq")
    packed = {"encoder_segment_ids": None}
    with pytest.raises(ValueError, match="pack=False"):
        model_for(encoder_with(NUMBER)).loss({}, packed)


def test_an_encoder_without_a_head_is_neither_trained_nor_asked_for_tokens():
    alone = TINY.encoder_only()
    with pytest.raises(ValueError, match="trained with a head"):
        model_for(alone).loss({}, {})
    with pytest.raises(ValueError, match="EMBED='mean'"):
        Predictor(alone, random_params(alone))
    with pytest.raises(ValueError, match="not tokens: see inference"):
        headed = alone.replace(**CLASSES)
        Predictor(headed, random_params(headed))
