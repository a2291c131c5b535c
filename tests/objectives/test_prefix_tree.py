"""Labels scored in one row of the decoder: the same as one at a time, and for little more."""

import functools

from helpers import (
    TINY,
    TINY_IMAGES,
    config,
    random_params,
    random_patches,
    random_tokens,
    without_loops,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.methods import Lora, PrefixTuning
from coda_jax.models import param_shapes
from coda_jax.objectives import Embedding, Seq2Seq
from coda_jax.objectives.prefix_tree import prefix_tree
from coda_jax.profiling import flops, timing

# Common beginnings, one that is the beginning of another, one that is only an end.
LABELS = [(5, 6, 7, 1), (5, 6, 1), (5, 9, 7, 8, 4, 1), (3, 1), (5, 6, 7, 2, 1), (1,)]


def test_a_tree_has_each_prefix_once():
    tree = prefix_tree(LABELS, start_id=0)
    prefixes = {label[:end] for label in LABELS for end in range(len(label))}
    assert len(tree.tokens) == len(prefixes) == 10
    depths = tree.seen.sum(1)
    for row, label in enumerate(LABELS):
        nodes = tree.nodes[row][tree.written[row]]
        assert (0, *label[:-1]) == tuple(tree.tokens[nodes])
        assert label == tuple(tree.targets[row][tree.written[row]])
        np.testing.assert_array_equal(np.flatnonzero(tree.seen[nodes[-1]]), nodes)
        np.testing.assert_array_equal(depths[nodes], 1 + np.arange(len(label)))
    assert not np.triu(tree.seen, 1).any()


@pytest.mark.parametrize("labels", [[], [(5, 1), ()]])
def test_a_target_without_tokens_is_refused(labels):
    with pytest.raises(ValueError, match="targets must have tokens, the end marker at least"):
        prefix_tree(labels, 0)


def one_at_a_time(cfg, params, inputs):
    """The sums of the log-probabilities of each label's tokens, in float64, [B, L]."""
    logits_of, found = jax.jit(Seq2Seq(cfg).logits), []
    for label in LABELS:
        targets = np.tile(np.int32((*label, 0, 0, 0, 0, 0)[:6]), (len(inputs), 1))
        started = np.pad(targets, ((0, 0), (1, 0)), constant_values=cfg.decoder_start_id)
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": started[:, :-1],
            "decoder_target_tokens": targets,
        }
        logits = np.asarray(logits_of(params, batch), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_tokens = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        found.append(np.where(targets > 0, of_tokens, 0).sum(1))
    return np.stack(found, 1)


CONFIGS = {
    "coda": config(coda={"reduction": 2.0}, num_encoder_layers=1),
    "prefix": TINY.replace(methods=(PrefixTuning(3, hidden=0),)),
    "lora": TINY.replace(methods=(Lora(2),)),
    "dense": TINY,
    "own_biases": config(coda={"reduction": 2.0}, shared_relpos_bias=False),
    "tied": TINY.replace(logits_via_embedding=True),
    "images": config(coda={"reduction": 2.0}, base=TINY_IMAGES),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "coda" else pytest.param(name, marks=pytest.mark.all) for name in CONFIGS],
)
def test_label_scores_are_the_sums_of_token_log_probabilities_one_label_at_a_time(rng, name):
    cfg = CONFIGS[name]
    params = random_params(cfg)
    inputs = random_tokens(rng, [8, 5, 3], 8)
    if name == "images":
        inputs = random_patches(rng, [(2, 3), (1, 4), (3, 3)], 9)
    tree = prefix_tree(LABELS, cfg.decoder_start_id)
    scored = jax.jit(functools.partial(Seq2Seq(cfg).score_targets, tree=tree))(params, inputs)
    expected = one_at_a_time(cfg, params, inputs)
    np.testing.assert_allclose(scored.log_probs, expected, rtol=1e-5, atol=1e-5)
    encoded = np.asarray(jax.jit(Seq2Seq(cfg).encode)(params, inputs))
    real = np.asarray(Seq2Seq(cfg).module.input_mask(inputs))
    means = np.stack([x[keep].mean(0) for x, keep in zip(encoded, real, strict=True)])
    np.testing.assert_allclose(scored.encoder, means, rtol=1e-4, atol=1e-5)


@pytest.mark.all
def test_the_first_state_is_what_the_first_logits_are_made_of(rng):
    cfg = CONFIGS["coda"]
    params, inputs = random_params(cfg), random_tokens(rng, [8, 5], 8)
    tree = prefix_tree(LABELS, cfg.decoder_start_id)
    state = np.asarray(Seq2Seq(cfg).score_targets(params, inputs, tree).decoder, np.float64)
    alone = Seq2Seq(cfg).score_targets(params, inputs, prefix_tree([(1,)], cfg.decoder_start_id))
    np.testing.assert_allclose(alone.decoder, state, rtol=1e-4, atol=1e-5)
    logits = state @ np.asarray(params["decoder"]["logits_dense"]["kernel"], np.float64)
    ended = logits[:, 1] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(alone.log_probs[:, 0], ended, rtol=1e-4)


@pytest.mark.all
def test_labels_cost_little_more_than_their_distinct_prefixes():
    """Counted by hand, with each token reading no more than its own prefix, against XLA's count."""
    cfg = TINY.replace(vocab_size=512, emb_dim=128, num_heads=2, head_dim=64, mlp_dim=256)
    rng, batch, length = np.random.default_rng(0), 2, 64
    labels = [(*rng.integers(2, 6, 4), *rng.integers(2, 512, 2), 1) for _ in range(30)]
    tree = prefix_tree(labels, 0)
    assert len(tree.tokens) < 0.8 * sum(map(len, labels))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    with without_loops():
        program = jax.jit(functools.partial(Seq2Seq(cfg).score_targets, tree=tree))
        found = timing.flops(program.lower(param_shapes(cfg), tokens).compile())
    encoder = flops.encoder_flops(cfg, batch, length)
    once = flops.answer_flops(cfg, batch, length, 0) - encoder  # keys and values of the encoding
    one = flops.answer_flops(cfg, batch, length, 1) - encoder - once
    read = 2 * 2 * cfg.num_decoder_layers * cfg.num_heads * cfg.head_dim  # of a token of a prefix
    own = batch * read * (tree.seen.sum() - len(tree.tokens))
    expected = once + len(tree.tokens) * one + own
    assert 0.95 * expected < found - encoder < 1.2 * expected
    each = sum(map(len, labels)) * one
    assert found - encoder < 0.85 * (once + each)


def test_a_model_without_a_decoder_has_no_probabilities_of_targets():
    cfg = TINY.encoder_only()
    with pytest.raises(ValueError, match="'embedding' has no probabilities of a list of targets"):
        Embedding(cfg).score_targets({}, np.ones((1, 3), np.int32), prefix_tree([(1,)], 0))
