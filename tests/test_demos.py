"""What the demos compare, and their reports."""

import json

from helpers import ADAPTER, config, random_params, random_tokens
import jax
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.commands.loading import LoadedModel
from coda_jax.demos import comparison, images, speech, text
from coda_jax.objectives import model_for

DEMOS = {"text": text.DEMO, "images": images.DEMO, "speech": speech.DEMO}


@pytest.mark.parametrize(
    ("name", "random_base"),
    [
        *((name, False) for name in DEMOS),
        pytest.param("images", True, marks=pytest.mark.all),
    ],
)
def test_methods_train_adapters_only(name, random_base):
    demo = DEMOS[name]
    models = comparison.compared(demo, random_base)
    assert list(models) == ["parallel adapter", *(f"CoDA r = {r}" for r in demo.reductions)]
    for model, r in zip(models.values(), (None, *demo.reductions), strict=True):
        trained, _ = methods.partition(model.config, model.params)
        assert trees.count(trained) < 0.1 * trees.count(model.params)  # tiny models
        names = [method.name for method in model.config.methods]
        assert names == (["parallel_adapter"] if r is None else ["coda", "parallel_adapter"])
        assert r is None or comparison.reduction_of(model) == r
        assert (model.directory is None) == random_base


@pytest.mark.all
def test_answers_and_routing_are_those_of_each_input_alone(rng):
    cfg = config(coda={"reduction": 2.0}, num_encoder_layers=1)
    model = LoadedModel(cfg, random_params(cfg), None)
    inputs = [random_tokens(rng, [length], length)[0] for length in (7, 4)]
    found = comparison.routed_answers(model, inputs, max_decode_length=5)
    module = model_for(cfg)

    @jax.jit
    def alone(params, rows):
        return module.routing(params, rows), module.predict(params, rows, max_decode_length=5)

    for (weights, answer), row in zip(found, inputs, strict=True):
        expected, (expected_answer,) = alone(model.params, row[None])
        np.testing.assert_allclose(weights, expected[:, 0], rtol=1e-5, atol=1e-6)
        assert answer == expected_answer.tolist()


@pytest.mark.all
def test_the_first_model_is_the_baseline_of_a_comparison(rng):
    """Its speed-up is 1; an encoder at r = 2 has fewer operations."""
    configs = {"first": config(adapter=ADAPTER), "second": config({"reduction": 2.0})}
    adapted = {name: LoadedModel(cfg, random_params(cfg), None) for name, cfg in configs.items()}
    inputs = random_tokens(rng, [16, 16], 16)
    report = comparison.measure(adapted, inputs, max_decode_length=2, rounds=2)
    assert list(report) == ["first", "second"]
    for part in ("encoder", "end_to_end"):
        assert report["first"][f"{part}_speed_up"] == 1
        assert report["second"][f"{part}_ms"] > 0
        low, high = report["second"][f"{part}_speed_up_quartiles"]
        assert low <= report["second"][f"{part}_speed_up"] <= high
    assert report["first"]["flops_ratio"] == 1 < report["second"]["flops_ratio"]


def test_a_report_becomes_tables_of_its_figures():
    speed = {
        "encoder_ms": 12.3,
        "encoder_speed_up": 2.345,
        "flops_ratio": 2.5,
        "end_to_end_ms": 20.0,
        "end_to_end_speed_up": 2.0,
    }
    slow = speed | {"encoder_ms": 99.0}
    row = {"score": 71.25, "trained_share": 0.031, "speed": {"64": speed, "256": slow}}
    report = {
        "task": "a_task",
        "metric": "wer",
        "steps": 10,
        "timed_lengths": [64, 256],
        "methods": {"CoDA r = 3": row},
        "baselines": {"linear_svm": 85.0},
        "versions": {"device": "cpu"},
    }
    written = comparison.markdown(json.loads(json.dumps(report)))
    assert "| | trained | word error rate | encoder |" in written
    assert "| CoDA r = 3 | 3.1% | 71.2 % | 12 ms | 2.35x | 2.50 | 20 ms | 2.00x |" in written
    assert "| linear svm | | 85.0 % |" in written
    assert "| CoDA r = 3 | 99 ms | 2.35x | 2.50 | 20 ms | 2.00x |" in written
