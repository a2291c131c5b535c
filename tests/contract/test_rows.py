"""Each row gives what it gives alone, and each layer takes the tokens that it may."""

import functools

from contract.programs import (
    LENGTHS,
    coda_of,
    in_bfloat16,
    inputs_of,
    mask_of,
    padded,
    params,
    relative_error,
    tokens_of_equal_choices,
    with_noise_in_padding,
)
from contract.table import each_case, routed
from helpers import as_with_bfloat16, encode
import jax
import numpy as np
import pytest

from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.train import train
from coda_jax.data.source import Data
from coda_jax.methods import METHODS, Method
from coda_jax.methods.selection import num_selected
from coda_jax.models import FAMILIES
from coda_jax.training.trainer import TrainOptions

SEGMENT_LENGTHS = (1, 4, 1, 1, 7, 2, 1, 1)  # with r = 3 they need 10 slots, not ceil(18 / 3) = 6
SOME_SEGMENTS = (4, 0, 1)  # of them, in the order in which they share another row


@each_case("rows")
def test_padding_changes_nothing(case):
    """Invariant 2: neither how much of it there is, nor what values lie in it."""
    config, mask = case.config, mask_of(LENGTHS)
    inputs = inputs_of(config)
    expected, _ = encode(config, params(config), inputs)
    assert np.isfinite(expected).all()
    noisy, _ = encode(config, params(config), with_noise_in_padding(config, inputs))
    np.testing.assert_allclose(noisy[mask], expected[mask], atol=1e-5)
    others = inputs_of(config, (16, 0), seed=1)
    wide = np.concatenate([others, padded(inputs[::-1], 7)])
    found, _ = encode(config, params(config), wide)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[2:][::-1, :9][mask], expected[mask], atol=1e-5)


@each_case("rows")
def test_other_rows_and_their_order_change_nothing(case):
    """Invariant 2."""
    config = case.config
    inputs = inputs_of(config)
    expected, _ = encode(config, params(config), inputs)
    found, _ = encode(config, params(config), inputs[::-1])
    np.testing.assert_allclose(found[::-1], expected, atol=1e-5)
    others = np.concatenate([inputs[:1], inputs_of(config, (9,) * 7, seed=1)])
    found, _ = encode(config, params(config), others)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


@each_case("rows")
def test_packed_examples_give_what_they_give_alone(case, tmp_path):
    """Invariant 3, in the encoder: many short segments, which round up one by one."""
    config = case.config
    if not all(method.packs for method in config.methods):
        return assert_packed_data_are_refused(config, tmp_path)
    inputs = inputs_of(config, SEGMENT_LENGTHS, seed=2)
    inputs = padded(inputs, max(LENGTHS) - inputs.shape[1])  # to share a program
    alone, _ = encode(config, params(config), inputs)
    rows = [row[:length] for row, length in zip(inputs, SEGMENT_LENGTHS, strict=True)]
    orders = (range(len(rows)), SOME_SEGMENTS)
    together = [packed_row(rows, order) for order in orders]
    packed, segments = map(np.stack, zip(*together, strict=True))
    found, selections = encode(config, params(config), packed, segments)
    for row, order in enumerate(orders):
        for number, i in enumerate(order, start=1):
            there = found[row][segments[row] == number]
            np.testing.assert_allclose(there, alone[i, : SEGMENT_LENGTHS[i]], atol=1e-5)
    for selection in selections.values():
        k = [num_selected(length, coda_of(config).reduction) for length in SEGMENT_LENGTHS]
        assert selection.valid.sum(-1).tolist() == [sum(k), sum(k[i] for i in SOME_SEGMENTS)]


def packed_row(rows, order, num_tokens=20):
    """(inputs, segment ids) of one row that holds some of the rows, and padding behind them."""
    inputs = np.concatenate([rows[i] for i in order])
    segments = np.repeat(np.arange(1, len(order) + 1), [len(rows[i]) for i in order])
    left = num_tokens - len(inputs)
    padded_inputs = np.pad(inputs, ((0, left),) + ((0, 0),) * (inputs.ndim - 1))
    return padded_inputs, np.pad(segments, (0, left)).astype(np.int32)


class Packed(Data):
    """Packed data of a vocabulary that fits every model."""

    def check_vocabulary(self, **model):
        """Accepts."""


def assert_packed_data_are_refused(config, tmp_path):
    """A run with them names the methods that cannot keep examples apart."""
    data = Packed({"inputs": 8, "targets": 8}, task="any", pack=True)
    with pytest.raises(ValueError, match="cannot keep packed examples apart"):
        train(
            str(tmp_path),
            LoadedModel(config, params(config), None),
            data,
            TrainOptions(total_steps=1),
            optimizer=None,
            learning_rate=1.0,
        )


def test_a_method_that_does_not_pack_is_refused_packed_data(monkeypatch, tmp_path):
    class Mixing(Method):
        """Looks across the examples of a row."""

        name = "mixing"
        packs = False

    monkeypatch.setitem(METHODS, Mixing.name, Mixing)
    tiny = next(iter(FAMILIES.values())).tiny
    assert_packed_data_are_refused(tiny.replace(methods=(Mixing(),)), tmp_path)


@each_case("budget", where=routed)
def test_a_layer_takes_at_most_its_share_and_no_padding(case):
    """Invariant 4."""
    config, mask = case.config, mask_of(LENGTHS)
    _, selections = encode(config, params(config), inputs_of(config))
    assert sorted(selections) == [f"layers_{i}" for i in range(config.num_encoder_layers)]
    k = np.array([num_selected(length, coda_of(config).reduction) for length in LENGTHS])
    for selection in selections.values():
        indices, weights, valid = map(
            np.asarray, (selection.indices, selection.weights, selection.valid)
        )
        assert indices.shape == (len(LENGTHS), k.max())
        assert (np.diff(indices) > 0).all()
        np.testing.assert_array_equal(valid.sum(-1), k)
        assert np.take_along_axis(mask, indices, axis=1)[valid].all()
        assert (weights[~valid] == 0).all() and (weights[valid] > 0).all()
        assert (weights <= 1).all() and (weights.sum(-1) <= k + 1e-4).all()


@each_case("rows")
def test_bfloat16_is_close_to_float32(case):
    """Save for rows of which a layer takes other tokens: two scores may be as good as equal.

    On a CPU without products of bfloat16; `test_bfloat16` is of the others.
    """
    config = case.config
    inputs = inputs_of(config)
    expected, exact = encode(config, params(config), inputs)
    with as_with_bfloat16(False):
        encoder = jax.jit(functools.partial(encode.__wrapped__, in_bfloat16(config)))
        found, rounded = encoder(params(config), inputs)
    assert found.dtype == in_bfloat16(config).dtype
    real = tokens_of_equal_choices(exact, rounded)
    error = relative_error(jax.device_get(found)[real], jax.device_get(expected)[real])
    assert 1e-4 < error < 0.03
