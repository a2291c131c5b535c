"""A family that nothing in the package knows does all that the others do."""

import dataclasses
import json
from typing import ClassVar

from contract.programs import base_params, batch_of
from flax import struct
from helpers import assert_same_tree
import jax
import numpy as np
import optax
import pytest

from coda_jax import methods, trees
from coda_jax.checkpoints import load_adapter, load_hf, save_adapter, save_hf, swap_in
from coda_jax.methods import METHODS
from coda_jax.models import FAMILIES, family_of
from coda_jax.models.t5.config import T5Config
from coda_jax.objectives import model_for
from coda_jax.training import steps


@struct.dataclass
class TeaConfig(T5Config):
    """A T5 by another name."""

    family: ClassVar[str] = "tea"


def record():
    """T5's record, save for the names."""
    t5 = FAMILIES[T5Config.family]
    (kind, *_) = t5.huggingface.model_types

    def made(config):
        return TeaConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    huggingface = dataclasses.replace(
        t5.huggingface,
        model_types=("tea",),
        parse_config=lambda raw, source: made(
            t5.huggingface.parse_config({**raw, "model_type": kind}, source)
        ),
        format_config=lambda config, dtype: {
            **t5.huggingface.format_config(config, dtype),
            "model_type": "tea",
        },
    )
    return dataclasses.replace(
        t5, config=TeaConfig, presets={}, tiny=made(t5.tiny), huggingface=huggingface
    )


@pytest.fixture
def dense(monkeypatch):
    """The dense config of the family, which is in the table during a test."""
    family = record()
    monkeypatch.setitem(FAMILIES, family.name, family)
    return family.tiny.replace(num_encoder_layers=1)


def test_a_new_family_loads_learns_and_saves(dense, tmp_path):
    """From a checkpoint in Hugging Face's layout to an adapter file and back."""
    save_hf(tmp_path / "base", dense, base_params(dense))
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "tea"
    config, base = load_hf(tmp_path / "base")
    assert config == dense and family_of(config).config is TeaConfig
    assert_same_tree(base, base_params(dense))

    every = [method.examples()[0] for method in METHODS.values()]
    some = tuple(method for method in every if r"" not in method.also_trains)
    config = config.replace(methods=some, dropout_rate=0.0)
    params = swap_in(config, base, jax.random.key(0))
    model = model_for(config)
    optimizer = steps.make_optimizer(model, optax.adam, 1e-2)
    step = steps.make_train_step(model, optimizer, accumulation=1, seed=0)
    trained, frozen = jax.device_get(steps.partition(model, params))
    state = steps.TrainState(np.zeros((), np.int32), trained, optimizer.init(trained))
    losses = []
    for _ in range(3):
        state, sums = step(state, frozen, batch_of(config))
        losses.append(float(sums.loss))
    assert losses[-1] < losses[0]

    learned = trees.merge(jax.device_get(state.trained), frozen)
    save_adapter(tmp_path / "adapter", config, learned)
    loaded, found = load_adapter(tmp_path / "adapter", *load_hf(tmp_path / "base"))
    assert loaded.methods == some and loaded.family == "tea"
    assert_same_tree(found, learned)
    assert_same_tree(methods.partition(loaded, found)[1], frozen)


def test_an_adapter_of_one_family_is_refused_by_another(dense, tmp_path):
    """Though all leaves are the same."""
    every = [method.examples()[0] for method in METHODS.values()]
    method = next(method for method in every if r"" not in method.also_trains)
    config = dense.replace(methods=(method,))
    base = base_params(dense)
    save_adapter(tmp_path, config, swap_in(config, base, jax.random.key(0)))
    t5 = FAMILIES[T5Config.family].tiny.replace(num_encoder_layers=1)
    with pytest.raises(ValueError, match=f"belongs to a 'tea', not to a '{t5.family}'"):
        load_adapter(tmp_path, t5, base)
