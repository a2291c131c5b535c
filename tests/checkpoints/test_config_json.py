"""Configurations as JSON: every one comes back as it was, and nothing unknown is accepted."""

import dataclasses
import json

from helpers import TINY, TINY_SPEECH
import jax.numpy as jnp
import pytest

from coda_jax.checkpoints.config_json import from_json, from_version_1, to_json
from coda_jax.methods import METHODS, Coda, Full, ParallelAdapter
from coda_jax.models import presets

FIELDS = {"family": "t5", "vocab_size": 20, "emb_dim": 16, "num_encoder_layers": 2}


def through_json(config):
    return from_json(json.loads(json.dumps(to_json(config), allow_nan=False)), "a file")


def other_value(field):
    """A value for a field that is not its default, of a type that it may have."""
    value = field.default
    if isinstance(value, tuple):
        return value + value[:1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2
    return value + 1 if isinstance(value, int) else value


def changed(method):
    """A method with another value for every field whose type tells a valid one."""
    fields = dataclasses.fields(method)
    return method(**{field.name: other_value(field) for field in fields})


@pytest.mark.parametrize("name", presets())
def test_every_preset_comes_back_as_it_was(name):
    config = presets()[name]
    assert through_json(config) == config
    assert type(through_json(config)) is type(config)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_written_by_name(dtype):
    config = TINY.replace(dtype=dtype)
    assert to_json(config)["dtype"] == jnp.dtype(dtype).name
    assert through_json(config) == config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_back_as_it_was(name):
    config = TINY.replace(methods=(METHODS[name](),))
    assert to_json(config)["methods"][0]["name"] == name
    assert through_json(config) == config
    config = TINY.replace(methods=(changed(METHODS[name]),))
    assert through_json(config) == config


def test_methods_come_back_together_and_in_their_order():
    config = TINY.replace(methods=(Full(), ParallelAdapter(3), Coda((1, 2.5))))
    assert [m["name"] for m in to_json(config)["methods"]] == ["coda", "parallel_adapter", "full"]
    assert through_json(config) == config
    written = to_json(config)
    written["methods"].reverse()
    assert from_json(written, "a file") == config


def test_every_field_of_a_config_comes_back():
    fields = [f for f in dataclasses.fields(TINY_SPEECH) if f.name not in ("methods", "dtype")]
    values = {field.name: getattr(TINY_SPEECH, field.name) for field in fields}
    others = {name: value + 1 for name, value in values.items() if type(value) is int}
    others |= {name: value / 2 for name, value in values.items() if type(value) is float}
    config = TINY_SPEECH.replace(**others)
    assert through_json(config) == config


def test_sizes_of_layers_are_written_where_there_are_any():
    config = TINY.replace(layer_sizes=(("encoder/layers_0/mlp", 3), ("decoder/layers_0/mlp", 5)))
    assert through_json(config) == config
    assert "layer_sizes" not in to_json(TINY)


def test_what_is_computed_again_is_of_no_model():
    """A run may go on with another policy, and what reads its files knows nothing of it."""
    config = TINY.replace(remat_policy="full")
    assert to_json(config) == to_json(TINY) and "remat_policy" not in to_json(config)
    assert through_json(config) == TINY


def test_a_field_that_was_not_written_has_its_default():
    assert from_json({"family": "t5", "vocab_size": 20}, "a file").emb_dim == 512
    found = from_json({**FIELDS, "methods": [{"name": "coda"}]}, "a file")
    assert found.methods == (Coda(),)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3], r"\[3\] is not an object"),
        ({"family": "conformer"}, "family='conformer' is unknown; it must be one of .'t5', 'pix"),
        ({"vocab_size": 20}, "family=None is unknown"),
        ({"family": "t5"}, "not valid: .*vocab_size"),
        ({**FIELDS, "depth": 3, "a": 1}, "unknown keys for T5Config: {'a': 1, 'depth': 3}"),
        ({**FIELDS, "patch_size": 3}, "unknown keys for T5Config: {'patch_size': 3}"),
        ({**FIELDS, "emb_dim": "16"}, "T5Config.emb_dim='16' of a wrong type"),
        ({**FIELDS, "emb_dim": 16.0}, "T5Config.emb_dim=16.0 of a wrong type"),
        ({**FIELDS, "emb_dim": True}, "T5Config.emb_dim=True of a wrong type"),
        ({**FIELDS, "emb_dim": None}, "T5Config.emb_dim=None of a wrong type"),
        ({**FIELDS, "dropout_rate": "0"}, "T5Config.dropout_rate='0' of a wrong type"),
        ({**FIELDS, "logits_via_embedding": 1}, "logits_via_embedding=1 of a wrong type"),
        ({**FIELDS, "mlp_activations": "relu"}, "mlp_activations='relu' of a wrong type"),
        ({**FIELDS, "mlp_activations": [3]}, r"mlp_activations=\(3,\) of a wrong type"),
        ({**FIELDS, "dtype": "complex64"}, "not valid: T5Config.dtype .*'complex64'"),
        ({**FIELDS, "layer_sizes": [["encoder/layers_0/mlp"]]}, "layer_sizes=.* of a wrong type"),
        ({**FIELDS, "layer_sizes": {"encoder/layers_0/mlp": 1}}, "layer_sizes=.* of a wrong type"),
        ({**FIELDS, "methods": {}}, "methods={} is not a list"),
        ({**FIELDS, "methods": ["coda"]}, "the method 'coda' is not an object"),
        ({**FIELDS, "methods": [{}]}, "a file: method None is unknown"),
        ({**FIELDS, "methods": [{"name": "lora9"}]}, "method 'lora9' is unknown"),
        ({**FIELDS, "methods": [{"name": "coda", "rank": 3}]}, "unknown keys for Coda: .'rank'"),
        ({**FIELDS, "methods": [{"name": "coda", "epsilon": "1"}]}, "Coda.epsilon='1' of a wrong"),
        ({**FIELDS, "methods": [{"name": "coda", "reduction": "3"}]}, "Coda.reduction='3' of a"),
        ({**FIELDS, "methods": [{"name": "coda", "reduction": ["3"]}]}, "Coda.reduction=.'3',. of"),
        ({**FIELDS, "methods": [{"name": "coda", "reduction": 0.5}]}, "not valid: .*0.5"),
        ({**FIELDS, "methods": [{"name": "coda", "reduction": [3]}]}, "1 entries for 2 encoder"),
        ({**FIELDS, "methods": [{"name": "coda"}] * 2}, "not valid: .* two of .'coda'"),
    ],
)  # fmt: skip
def test_what_is_unknown_or_wrong_is_refused_by_name(values, text):
    with pytest.raises(ValueError, match=text) as error:
        from_json(values, "a file")
    assert str(error.value).startswith("a file")


# --- Version 1 ---

CODA, ADAPTER = {"reduction": 3, "max_segments": 4}, {"bottleneck": 8}


@pytest.mark.parametrize("beside", [True, False])
def test_methods_of_version_1_were_beside_the_fields_or_among_them(beside):
    parts = {"coda": CODA, "adapter": ADAPTER}
    given = (FIELDS, parts) if beside else ({**FIELDS, **parts}, {})
    config = from_version_1(*given, "a file")
    assert config.methods == (Coda(3, max_segments=4), ParallelAdapter(8))
    assert config.dense() == from_json(FIELDS, "a file")


def test_methods_that_version_1_did_not_have_are_left_out():
    config = from_version_1(FIELDS, {"coda": None, "adapter": ADAPTER}, "a file", "all")
    assert config.methods == (ParallelAdapter(8), Full())
    assert from_version_1({**FIELDS, "coda": None}, {}, "a file").methods == ()


@pytest.mark.parametrize(
    ("values", "adaptation", "trained", "text"),
    [
        ([3], {}, "all", r"\[3\] is not an object"),
        (FIELDS, {"coda": [3]}, "all", r"'coda': \[3\]"),
        (FIELDS, {"coda": {"rank": 3}}, "all", "unknown keys for Coda: .'rank'"),
        (FIELDS, {"coda": CODA}, "routers", "trained='routers' is unknown"),
    ],
)
def test_what_version_1_did_not_write_is_refused(values, adaptation, trained, text):
    with pytest.raises(ValueError, match=text):
        from_version_1(values, adaptation, "a file", trained)


@pytest.mark.parametrize("field", ["num_encoder_layers", "num_decoder_layers"])
def test_more_layers_than_any_model_has_are_refused_before_a_network_is_made(field):
    with pytest.raises(
        ValueError, match=rf"a file is not valid: .*{field} must be .* to 1000, got 10"
    ):
        from_json({**to_json(TINY), field: 100_000}, "a file")


@pytest.mark.parametrize("name", [[], {}, None, 3])
def test_a_name_that_is_no_text_is_unknown(name):
    with pytest.raises(ValueError, match=r"a file: family=.* is unknown"):
        from_json({**to_json(TINY), "family": name}, "a file")
    with pytest.raises(ValueError, match=r"a file: method .* is unknown"):
        from_json({**to_json(TINY), "methods": [{"name": name}]}, "a file")
