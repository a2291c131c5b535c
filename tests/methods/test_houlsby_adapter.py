"""Houlsby's adapter, beside what the contract tests check for every method."""

import collections

from helpers import TINY, TINY_SPEECH, shapes
import jax
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.methods import HoulsbyAdapter, partition
from coda_jax.methods.base import applied_to_modules
from coda_jax.nn.layers import MlpBlock, Normalized


def test_adapter_is_behind_the_sublayer(rng):
    """z + relu(z W_down) W_up in float64, z from the block itself."""
    block, x = MlpBlock(7, dropout_rate=0.0), rng.normal(size=(2, 4, 6)).astype(np.float32)
    method = HoulsbyAdapter(3)
    with applied_to_modules((method,)):
        params = block.init(jax.random.key(0), x, True)["params"]
        assert trees.flatten(params).keys() == {
            "wi/kernel", "wo/kernel", "houlsby/wi/kernel", "houlsby/wo/kernel",
        }  # fmt: skip
        params["houlsby"]["wo"]["kernel"] = rng.normal(size=(3, 6)).astype(np.float32)
        found = block.apply({"params": params}, x, True)
    plain = {name: params[name] for name in ("wi", "wo")}
    z = np.asarray(block.apply({"params": plain}, x, True), np.float64)
    down, up = (np.asarray(params["houlsby"][n]["kernel"], np.float64) for n in ("wi", "wo"))
    np.testing.assert_allclose(found, z + np.maximum(z @ down, 0) @ up, atol=1e-5)


@pytest.mark.parametrize("reads", ["sum", "input"])
def test_the_residual_stream_is_read(reads, rng):
    """z + relu(v W_down + b) W_up + b', v = x + z or x, with x before its norm."""
    x, scale = (rng.normal(size=size).astype(np.float32) for size in ((2, 4, 6), 6))
    inverse = (np.square(x).mean(-1, keepdims=True) + 1e-6) ** -0.5
    block, given = MlpBlock(7, dropout_rate=0.0), Normalized(x, inverse, scale)
    with applied_to_modules((HoulsbyAdapter(3, use_bias=True, reads=reads),)):
        params = block.init(jax.random.key(0), given, True)["params"]
        params["houlsby"] = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params["houlsby"]
        )
        found = block.apply({"params": params}, given, True)
    plain = {name: params[name] for name in ("wi", "wo")}
    z = np.asarray(block.apply({"params": plain}, given, True), np.float64)
    flat = trees.flatten(params["houlsby"])
    v = {"sum": x + z, "input": x}[reads]
    hidden = np.maximum(v @ flat["wi/kernel"] + flat["wi/bias"], 0)
    expected = z + hidden @ flat["wo/kernel"] + flat["wo/bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_targets_and_norms_are_chosen():
    method = HoulsbyAdapter(2, targets=("^encoder/layers_1/mlp$",), train_norms=False)
    config = TINY.replace(methods=(method,))
    trained, _ = partition(config, shapes(config)["params"])
    assert trees.flatten(trained).keys() == {
        f"encoder/layers_1/mlp/houlsby/{name}/kernel" for name in ("wi", "wo")
    }
    with pytest.raises(ValueError, match=r"targets \['ffn'\] match no sublayer; there are .*'mlp'"):
        TINY.replace(methods=(HoulsbyAdapter(2, targets=("ffn", "mlp")),))


def test_a_family_without_the_residual_stream_refuses_to_read_it():
    config = TINY_SPEECH.replace(methods=(HoulsbyAdapter(2, reads="sum"),))
    with pytest.raises(ValueError, match=r"HoulsbyAdapter.reads='sum' needs the residual stream"):
        shapes(config)


@pytest.mark.parametrize(
    "config, expected", [(TINY, {"encoder": 2, "decoder": 3}), (TINY_SPEECH, {"encoder": 4})]
)
def test_each_sublayer_has_one(config, expected):
    """Two for attention and feed-forward, three with cross-attention, four in a Conformer layer."""
    made = trees.flatten(shapes(config.replace(methods=(HoulsbyAdapter(2),)))["params"])
    layers = collections.Counter(
        "/".join(path.split("/")[:2]) for path in made if path.endswith("houlsby/wi/kernel")
    )
    assert {name.split("/")[0]: number for name, number in layers.items()} == expected
    assert len(layers) == config.num_encoder_layers + (
        config.num_decoder_layers if "decoder" in expected else 0
    )


def test_fields_are_checked():
    for options, message in (
        ({"bottleneck": 0}, r"HoulsbyAdapter\.bottleneck must be .* 1, got 0"),
        ({"reads": "everything"}, r"HoulsbyAdapter\.reads must be one of .* got 'everything'"),
        ({"activation": "swoosh"}, r"HoulsbyAdapter\.activation must be one of .* got 'swoosh'"),
    ):
        with pytest.raises(ValueError, match=message):
            HoulsbyAdapter(**options)
