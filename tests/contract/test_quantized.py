"""The invariants of models whose frozen matrices are int8; 1 and 7 against these as floats."""

import functools

from contract import (
    programs,
    test_arithmetic,
    test_own_leaves,
    test_rows,
    test_training,
)
from contract.programs import base_params, batch_of, coda_of, inputs_of, outputs
from contract.table import CASES, DENSE, any_case, parametrized, routed, with_one_family
from helpers import GOLDEN, assert_same_tree
import jax
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.checkpoints import load_adapter, load_hf, quantize, save_adapter, swap_in
from coda_jax.checkpoints.quantization import quantized_shapes
from coda_jax.commands.export import export, program_name
from coda_jax.commands.loading import LoadedModel
from coda_jax.inference import Decoding
from coda_jax.methods import METHODS, Coda, Lora, ParallelAdapter
from coda_jax.methods.coda import with_reduction
from coda_jax.models import param_shapes
from coda_jax.nn.quantized import INT8, Quantized, quantization_of
from coda_jax.objectives import model_for

DEFAULT = "t5-coda+parallel_adapter"  # in `make test`


def each_case(where=any_case, default=()):
    """Parametrizes over the cases with int8 weights."""
    quantized = (case for case in CASES if all(method.on_quantized for method in case.methods))
    return parametrized(filter(where, with_one_family(quantized)), default)


@functools.cache
def params(config):
    """Those of `programs`, quantised."""
    return quantize(config, programs.params(config))


@functools.cache
def fresh_params(config):
    """Likewise."""
    return quantize(config, programs.fresh_params(config))


def as_floats(tree):
    """The matrices that int8 stands for."""
    return trees.unflatten({path: np.asarray(x) for path, x in trees.flatten(tree).items()})


@pytest.fixture
def int8(monkeypatch):
    """Other modules' contracts take the parameters of this one."""
    for module in (test_rows, test_training, test_own_leaves):
        monkeypatch.setattr(module, "params", params)
        if hasattr(module, "fresh_params"):
            monkeypatch.setattr(module, "fresh_params", fresh_params)
    monkeypatch.setattr(test_own_leaves, "adapter", test_own_leaves.adapter.__wrapped__)


@each_case(default=[DEFAULT])
def test_int8_gives_what_its_floats_give(case):
    """Every matrix that stays frozen is int8, and close to what it was."""
    config, quantised = case.config, params(case.config)
    _, frozen = methods.partition(config, quantised)
    before = trees.flatten(programs.params(config))
    for path, leaf in trees.flatten(frozen).items():
        assert isinstance(leaf, Quantized) == path.endswith(("/kernel", "/embedding")), path
        if isinstance(leaf, Quantized):
            steps = np.abs(np.asarray(leaf) - before[path]) / leaf.scale
            assert steps.max() < 0.5001, path
    found = outputs(config, quantised, batch_of(config))
    expected = outputs(config, as_floats(quantised), batch_of(config))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@each_case(lambda case: all(method.starts_as_base for method in case.methods))
def test_fresh_methods_leave_the_base_as_it_is(case):
    """Invariant 1, against the dense model with the matrices that int8 stands for."""
    config, dense = case.config, case.config.dense()
    if coda_of(config) is not None:
        config = config.replace(methods=with_reduction(config.methods, 1))
    base = trees.split(fresh_params(case.config), methods.created(config))[1]
    found = outputs(config, fresh_params(case.config), batch_of(config))
    expected = outputs(dense, as_floats(base), batch_of(config))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("int8")
@each_case()
def test_rows_are_independent(case, tmp_path):
    """Invariants 2 to 4, where a layer takes a share of the tokens."""
    test_rows.test_padding_changes_nothing(case)
    test_rows.test_other_rows_and_their_order_change_nothing(case)
    test_rows.test_packed_examples_give_what_they_give_alone(case, tmp_path)
    if routed(case):
        test_rows.test_a_layer_takes_at_most_its_share_and_no_padding(case)


@pytest.mark.usefixtures("int8")
@each_case(lambda case: case.method != DENSE)
def test_gradients_are_those_of_finite_differences(case):
    """Through int8 matrices."""
    test_training.test_every_gradient_is_that_of_finite_differences(case)


@each_case(lambda case: case.method != DENSE)
def test_training_leaves_int8_as_it_is(case):
    """Invariant 5: the frozen leaves are an argument of the step; what is trained is float."""
    config, model = case.config, test_training.training(case.config)[0]
    trained, frozen = test_training.steps.partition(model, fresh_params(config))
    assert quantization_of(trained) is None and quantization_of(frozen) == INT8
    before = jax.tree.map(np.array, frozen)
    state, sums = test_training.after_steps(config, trained, frozen, number=2)
    assert np.isfinite(sums.loss)
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, before))
    after = trees.flatten(jax.device_get(state.trained))
    masks = programs.without_gradient(config)
    for path, leaf in trees.flatten(trained).items():
        assert trees.matches(path, masks) or not np.array_equal(after[path], leaf), path


@each_case(lambda case: case.method != DENSE, default=[DEFAULT])
def test_an_adapter_says_that_its_base_was_int8(case, tmp_path):
    """Invariant 6: onto the base as it was, or quantised before; another base is refused."""
    config, quantised = case.config, params(case.config)
    save_adapter(tmp_path, config, quantised)
    _, base = trees.split(programs.params(config), methods.created(config))
    for given in (base, quantize(config, base)):
        loaded, found = load_adapter(tmp_path, config.dense(), given)
        assert loaded == config and quantization_of(found) == INT8
        assert_same_tree(found, quantised)
    path = next(p for p, x in trees.flatten(quantised).items() if isinstance(x, Quantized))
    changed = trees.flatten(base)[path].copy()
    changed[0, 0] *= 1 + 1e-6
    other = trees.unflatten({**trees.flatten(base), path: changed})
    with pytest.raises(ValueError, match=f"another base; 1 of .*\n  {path}"):
        load_adapter(tmp_path, config.dense(), other)


@pytest.mark.all
@pytest.mark.parametrize("name", ["v1_1", "v1_0"])
def test_the_originals_weights_as_int8(name):
    """Invariant 7: the original's logits with these weights are those of the floats.

    How far int8 is from the original's own weights is no more than rounding them explains.
    """
    config, base = load_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "logits.npz")
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    given = (golden[x] for x in ("encoder", "decoder_inputs", "decoder_targets"))
    batch, quantised = dict(zip(names, given, strict=True)), quantize(config, base)
    valid = golden["decoder_targets"] > 0
    found = np.asarray(outputs(config, quantised, batch))[valid]
    expected = np.asarray(outputs(config, as_floats(quantised), batch))[valid]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert 1e-4 < programs.relative_error(found, golden["logits"][valid]) < 0.03


@each_case()
def test_work_is_skipped(case, monkeypatch):
    """Invariant 8: operations are those of the formula, which knows nothing of int8."""

    def shapes(config):
        return quantized_shapes(config, param_shapes(config))

    monkeypatch.setattr(test_arithmetic, "param_shapes", shapes)
    uncached = test_arithmetic.compiled_flops.__wrapped__
    monkeypatch.setattr(test_arithmetic, "compiled_flops", uncached)
    test_arithmetic.test_compiled_work_is_that_of_the_formula(case)


@pytest.mark.all
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_tokens_have_equal_scores(dtype, monkeypatch, rng):
    """Invariant 9."""
    from methods import test_ties

    made = test_ties.make_model

    def as_int8(*arguments, **sizes):
        config, floats = made(*arguments, **sizes)
        return config, quantize(config, floats)

    monkeypatch.setattr(test_ties, "make_model", as_int8)
    for width in (("k_to_k", 192, 1), ("k_to_all", 36, 1000)):
        test_ties.assert_equal_scores(rng, dtype, *width)


@pytest.mark.usefixtures("int8")
@each_case(test_own_leaves.shares_leaves)
def test_each_row_has_its_own_adapter(case):
    """Invariant 11."""
    test_own_leaves.test_each_row_gives_what_it_gives_alone_with_its_adapter(case)
    test_own_leaves.test_padding_and_the_order_of_rows_change_nothing(case)


@each_case()
def test_bfloat16_is_close_to_float32(case):
    """As near as the floats that int8 stands for."""
    config, quantised = programs.in_bfloat16(case.config), params(case.config)
    if routed(case):
        config = config.replace(methods=with_reduction(config.methods, 1))
    found = outputs(config, quantised, batch_of(config))
    exact = outputs(config.replace(dtype="float32"), quantised, batch_of(config))
    floats = outputs(config, as_floats(quantised), batch_of(config))
    error = programs.relative_error(found, exact)
    assert error < max(1.5 * programs.relative_error(floats, exact), 0.02)


@each_case(lambda case: case.method != DENSE)
def test_an_exported_program_gives_the_models_tokens(case, tmp_path):
    """Nothing is merged; the weights are int8 arrays and their scales."""
    config, inputs = case.config, inputs_of(case.config)
    size, length = inputs.shape[:2]
    decoding = Decoding(max_input_length=length, max_decode_length=3, batch_size=size)
    export(LoadedModel(config, params(config), None), str(tmp_path), decoding)
    program = jax.export.deserialize((tmp_path / program_name(size, length)).read_bytes())
    weights = np.load(tmp_path / "weights.npz")
    arrays = jax.tree.leaves(trees.flatten(params(config)))
    assert [x.nbytes for x in weights.values()] == [x.nbytes for x in arrays]
    predict = jax.jit(lambda p, x: model_for(config).predict(p, x, max_decode_length=3))
    expected = predict(params(config), inputs)
    np.testing.assert_array_equal(program.call(arrays, inputs), expected)


def test_what_needs_float_weights_is_refused():
    config = CASES[0].config
    base = base_params(config)
    for kind in METHODS.values():
        if kind.on_quantized:
            continue
        for example in kind.examples():
            with pytest.raises(ValueError, match=f"'int8' is of no use to \\['{kind.name}'\\]"):
                quantize(config.replace(methods=(example,)), base)
    config = config.replace(methods=(Lora(rank=2),))
    quantised = quantize(config, swap_in(config, base, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"\['lora'\] cannot be merged into int8 weights"):
        methods.merge(config, quantised)
    config = config.replace(methods=(Coda(), ParallelAdapter(bottleneck=4)))
    quantised = quantize(config, swap_in(config, base, jax.random.key(0)))
    assert methods.merge(config, quantised) == (config, quantised)  # there is nothing to merge


def test_a_matrix_that_is_not_finite_is_refused():
    config = CASES[0].config
    flat = trees.flatten(base_params(config))
    path = next(path for path in flat if path.endswith("wo/kernel"))
    wrong = flat[path].copy()
    wrong[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=path):
        quantize(config, trees.unflatten({**flat, path: wrong}))
