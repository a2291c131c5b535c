"""What models make of lists of inputs, whatever their lengths and order."""

from helpers import TINY, config, random_params, random_tokens, without_loops
import jax
import numpy as np
import pytest

from coda_jax.inference import Decoding
from coda_jax.models import param_shapes
from coda_jax.objectives import model_for
from coda_jax.objectives.prefix_tree import prefix_tree
from coda_jax.ood.outputs import Outputs, of_head
from coda_jax.profiling import timing

LABELS = [(5, 6, 1), (5, 1), (3, 1)]


def inputs_of(rng, lengths):
    return [random_tokens(rng, [n], n)[0] for n in lengths]


@pytest.mark.all
def test_a_list_is_scored_as_each_of_its_inputs_is(rng):
    cfg = config(coda={"reduction": 2.0}, num_encoder_layers=1, num_decoder_layers=1)
    params, inputs = random_params(cfg), inputs_of(rng, [9, 2, 5, 30, 4])
    outputs = Outputs(cfg, params, Decoding(batch_size=2, max_input_length=16), LABELS)
    found = dict(outputs(inputs))
    assert sorted(found) == [*range(5)]
    assert outputs.num_truncated == 1 and "1 of 5 inputs were longer than 16" in outputs.cuts()[0]
    tree, model = prefix_tree(LABELS, 0), model_for(cfg)
    for index in (1, 4):
        alone = jax.jit(lambda p, x: model.score_targets(p, x, tree))(params, inputs[index][None])
        logits, features, _ = found[index]
        np.testing.assert_allclose(logits, alone.log_probs[0], rtol=1e-4, atol=1e-4)
        for name in ("encoder", "decoder"):
            np.testing.assert_allclose(
                features[name], getattr(alone, name)[0], rtol=1e-3, atol=1e-4
            )


@pytest.mark.all
def test_a_head_gives_its_logits_and_the_mean_of_the_encoder(rng):
    cfg = TINY.encoder_only().replace(head="classification", labels=("a", "b", "c"))
    params, (one,) = random_params(cfg), inputs_of(rng, [7])
    ((_, (logits, features, _)),) = Outputs(cfg, params, Decoding())([one])
    model = model_for(cfg)
    np.testing.assert_allclose(logits, model.predict(params, one[None])[0], rtol=1e-4)
    expected = np.asarray(model.encode(params, one[None])[0]).mean(0)
    np.testing.assert_allclose(features["encoder"], expected, rtol=1e-4, atol=1e-5)
    assert features.keys() == {"encoder"}
    with pytest.raises(ValueError, match="this model has a head"):
        Outputs(cfg, params, Decoding(), LABELS)


@pytest.mark.all
def test_a_head_and_its_features_cost_one_pass_of_the_encoder():
    cfg = config(coda={"reduction": 2.0}).encoder_only()
    cfg = cfg.replace(head="classification", labels=("a", "b", "c"))
    model, inputs = model_for(cfg), jax.ShapeDtypeStruct((2, 32), np.int32)

    def flops(program):
        return timing.flops(jax.jit(program).lower(param_shapes(cfg), inputs).compile())

    with without_loops():
        assert flops(of_head(model)) < 1.05 * flops(model.predict)


def test_a_model_that_cannot_score_labels_is_refused():
    for cfg, labels in ((TINY, []), (TINY.encoder_only(), LABELS)):
        with pytest.raises(ValueError, match="labels are those of a model's head, or texts"):
            Outputs(cfg, random_params(cfg), Decoding(), labels)


@pytest.mark.all
def test_an_input_whose_outputs_are_not_finite_is_named(rng):
    params = random_params(TINY)
    params["decoder"]["logits_dense"]["kernel"] *= np.nan
    with pytest.raises(FloatingPointError, match="no answer to input 10 "):
        [*Outputs(TINY, params, Decoding(), LABELS)(inputs_of(rng, [4]), first=10)]
