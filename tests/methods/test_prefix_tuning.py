"""Prefix tuning, beside what the contract tests check for every method."""

from helpers import TINY, TINY_SPEECH, random_params, shapes
import numpy as np
import pytest
from scipy.special import softmax

from coda_jax import methods, trees
from coda_jax.methods import PrefixTuning
from coda_jax.methods.base import applied_to_modules
from coda_jax.nn.attention import DotProductAttention
from coda_jax.objectives import Seq2Seq

B, H, Q, L, K, P = 2, 3, 4, 6, 5, 7


def arrays(rng, *shapes):
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_sees_the_prefix_first(rng, masked):
    """In float64 by hand: no bias and no mask on the prefix, every row sees the same."""
    query, key, value, bias = arrays(rng, (B, H, Q, K), (B, H, L, K), (B, H, L, K), (1, H, Q, L))
    mask = rng.random((B, 1, 1, L)) < 0.5 if masked else None
    prefix_key, prefix_value = arrays(rng, (P, H * K), (P, H * K))
    variables = {"params": {"prefix": {"key": prefix_key, "value": prefix_value}}}
    with applied_to_modules((PrefixTuning(P, hidden=0),)):
        found = DotProductAttention().apply(variables, query, key, value, bias, mask)

    def before(prefix, x):
        heads = np.moveaxis(prefix.reshape(P, H, K), 1, 0)
        return np.concatenate([np.broadcast_to(heads, (B, H, P, K)), x], axis=2, dtype=np.float64)

    key, value = before(prefix_key, key), before(prefix_value, value)
    seen = np.ones((B, 1, 1, L), bool) if mask is None else mask
    logits = np.einsum("bhqk,bhlk->bhql", query.astype(np.float64), key)
    logits[..., P:] = np.where(seen, logits[..., P:] + bias, -np.inf)
    expected = np.einsum("bhql,bhlk->bhqk", softmax(logits, axis=-1), value)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("config, attentions", [(TINY, 3), (TINY_SPEECH, 1)])
def test_every_attention_has_a_prefix(config, attentions):
    config = config.replace(
        methods=(PrefixTuning(3, hidden=4),), num_encoder_layers=1, dropout_rate=0.0
    )
    made = trees.flatten(shapes(config)["params"])
    found = [path for path in made if path.endswith("dot_product/prefix/embedding")]
    assert len(found) == attentions == sum(path.endswith("out/kernel") for path in made)


def test_finish_leaves_keys_and_values_alone(rng):
    """tanh(E W_in + b_in) W_out + b_out in float64, half of it keys."""
    config = TINY.replace(methods=(PrefixTuning(3, hidden=4),))
    params = random_params(config)
    finished, after = methods.finish(config, params)
    assert finished.methods == (PrefixTuning(3, hidden=0),)
    start = "decoder/layers_0/self_attention/dot_product/prefix/"
    before = {
        path.removeprefix(start): np.asarray(leaf, np.float64)
        for path, leaf in trees.flatten(params).items()
        if path.startswith(start)
    }
    hidden = np.tanh(before["embedding"] @ before["wi/kernel"] + before["wi/bias"])
    made = hidden @ before["wo/kernel"] + before["wo/bias"]
    flat = trees.flatten(after)
    assert [path for path in flat if path.startswith(start)] == [f"{start}key", f"{start}value"]
    found = np.concatenate([flat[f"{start}key"], flat[f"{start}value"]], axis=1)
    np.testing.assert_allclose(found, made, atol=1e-5)


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"length": 0}, r"PrefixTuning\.length must be .* 1, got 0"),
        ({"hidden": -1}, r"PrefixTuning\.hidden must be .* 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefixTuning(**options)
    with pytest.raises(ValueError, match=r"\['prefix_tuning'\] cannot keep packed examples apart"):
        methods.check_packs((PrefixTuning(),))
    config = TINY.replace(methods=(PrefixTuning(3),))
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = dict.fromkeys((*names, "encoder_segment_ids"), np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="cannot keep packed examples apart"):
        Seq2Seq(config).logits(random_params(config), batch)
