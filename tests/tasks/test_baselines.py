"""The linear classifiers that stand beside the demo's accuracies."""

import dataclasses

from helpers import config
import jax.numpy as jnp
import pytest

from coda_jax.commands.loading import load_model
from coda_jax.tasks import baselines


@pytest.mark.all
def test_a_linear_classifier_beats_the_majority_class_by_far():
    result = baselines.baselines("stdlib_exception")
    assert 10 < result["majority_class"] < 50
    assert 65 < result["linear_svm"] < 100


@pytest.mark.all
def test_a_linear_probe_sees_what_the_features_hold():
    random = load_model(config=config(vocab_size=4096, emb_dim=32))
    found = baselines.linear_probe(random, "stdlib_exception")
    majority = baselines.majority_class("stdlib_exception")
    assert min(found["embeddings"], found["encoder"]) > majority + 5
    assert found["mean_cosine"] < 0.5

    # All tokens look the same: nothing to tell examples apart by is left.
    table = random.params["token_embedder"]["embedding"]
    same = {"embedding": jnp.broadcast_to(table[:1], table.shape)}
    blind = dataclasses.replace(random, params={**random.params, "token_embedder": same})
    found = baselines.linear_probe(blind, "stdlib_exception")
    assert max(found["embeddings"], found["encoder"]) <= majority + 5
    assert found["mean_cosine"] > 0.99
