"""The shapes and dtypes in the annotations of public functions hold; wrong ones are caught."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
import typing

from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from flax import linen
import jax
import jax.numpy as jnp
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped
import numpy as np
import pytest

from coda_jax import methods, models, nn
from coda_jax.commands.bench_programs import random_batch
from coda_jax.methods import coda, selection
from coda_jax.methods.soft_topk import soft_topk
from coda_jax.models import FAMILIES, param_shapes
from coda_jax.nn import convolution, dot_product_attention, tokens
from coda_jax.objectives import ctc, model_for

SCORES = jnp.arange(12.0).reshape(2, 6)
MASK = jnp.ones((2, 6), bool)
HEADS = jnp.ones((2, 6, 3, 4))
VIOLATIONS = (TypeCheckError, BeartypeCallHintViolation)
check = jaxtyped(typechecker=beartype)

# Function, good arguments, and for some argument a bad value.
CASES = [
    (soft_topk, {"scores": SCORES, "k": 2, "mask": MASK}, {"scores": jnp.arange(6)}),
    (soft_topk, {"scores": SCORES, "k": jnp.array([1, 2])}, {"mask": MASK[:, :5]}),
    (
        soft_topk,
        {"scores": SCORES, "k": jnp.ones((2, 1), int), "segment_ids": MASK.astype(int)},
        {"segment_ids": MASK},
    ),
    (
        selection.select,
        {"scores": SCORES, "k": jnp.ones((2, 1), int), "num_slots": 2, "mask": MASK},
        {"mask": MASK[:1]},
    ),
    (selection.num_selected, {"length": jnp.array([3, 4]), "reduction": 2.0}, {"length": SCORES}),
    (
        dot_product_attention.attend,
        {"query": HEADS, "key": HEADS, "value": HEADS, "bias": None, "mask": None},
        {"value": HEADS[:, :5]},
    ),
    (
        convolution.causal_convolution,
        {"x": HEADS[..., 0], "kernel": jnp.ones((5, 3)), "segment_ids": MASK.astype(int)},
        {"kernel": jnp.ones((5, 4))},
    ),
    (tokens.join_frames, {"features": HEADS[..., 0], "feature_mask": MASK}, {"features": SCORES}),
    (
        ctc.ctc_loss,
        {
            "logits": HEADS[..., 0],
            "mask": MASK,
            "targets": jnp.ones((2, 4), int),
            "target_mask": jnp.ones((2, 4), bool),
        },
        {"target_mask": MASK},
    ),
    (ctc.ctc_greedy, {"logits": HEADS[..., 0], "mask": MASK}, {"mask": SCORES}),
]


def shape_of(function, arguments):
    """What a function gives, as shapes; nothing is compiled."""
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    others = {name: value for name, value in arguments.items() if name not in arrays}
    return jax.eval_shape(functools.partial(function, **others), **arrays)


@pytest.mark.parametrize(("function", "arguments", "bad"), CASES)
def test_good_arguments_pass_and_bad_ones_do_not(function, arguments, bad):
    checked = check(function)
    shape_of(checked, arguments)
    with pytest.raises(VIOLATIONS):
        shape_of(checked, {**arguments, **bad})


def flax_modules():
    """The Flax modules of networks, with the public functions that each defines."""
    for package in (nn, methods, models):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(found.name)).values():
                here = inspect.isclass(value) and value.__module__ == found.name
                if here and issubclass(value, linen.Module):
                    yield value, dict(own_functions(value))


def own_functions(cls):
    """(name, function) of those that a class defines and others call."""
    for name, value in vars(cls).items():
        public = name == "__call__" or not name.startswith("_")
        inherited = not getattr(value, "__qualname__", "").startswith(f"{cls.__name__}.")
        if inspect.isfunction(value) and public and not inherited and name != "setup":
            yield name, value


FLAX_MODULES = dict(flax_modules())
CALLS = [
    pytest.param(function, id=f"{module.__name__}.{name}")
    for module, functions in FLAX_MODULES.items()
    for name, function in functions.items()
]


def is_described(annotation):
    """Whether a type says of every array in it what shape and dtype it has."""
    if inspect.isclass(annotation) and issubclass(annotation, (AbstractArray, linen.Module)):
        return True
    if dataclasses.is_dataclass(annotation):  # `Tokens`, `Selection`
        return all(is_described(kind) for kind in typing.get_type_hints(annotation).values())
    if arguments := typing.get_args(annotation):
        return all(map(is_described, arguments))
    return annotation in (bool, int, types.NoneType)


@pytest.mark.parametrize("function", CALLS)
def test_every_public_call_of_a_module_has_shapes_and_a_docstring(function):
    signature = inspect.signature(function)
    undescribed = [
        name
        for name, parameter in signature.parameters.items()
        if name != "self" and not is_described(parameter.annotation)
    ]
    assert not undescribed
    assert is_described(signature.return_annotation)
    assert inspect.getdoc(function)


def configs():
    """Of every family, with and without a decoder, and of every attention of the routing."""
    for family in FAMILIES.values():
        tiny = family.tiny.replace(num_encoder_layers=1, dropout_rate=0.1)
        for cfg in dict.fromkeys([tiny, tiny.replace(num_decoder_layers=1)]):
            for of_selected in coda.ATTENTIONS:
                routing = coda.Coda(2.0, attention=of_selected)
                yield cfg.replace(methods=(routing, methods.ParallelAdapter(4)))
        yield tiny.replace(methods=(methods.PrefixTuning(6, hidden=10),))


def trace(cfg):
    """Traces the loss, with packed rows where there can be such, and beam search."""
    model, params = model_for(cfg), param_shapes(cfg)
    batch = random_batch(cfg, 3, 11, 5)
    inputs, segments = batch["encoder_input_tokens"], np.ones((3, 11), np.int32)
    if cfg.num_decoder_layers and all(method.packs for method in cfg.methods):
        for name, size in (("encoder", 11), ("decoder", 5)):
            for kind in ("segment_ids", "positions"):
                batch[f"{name}_{kind}"] = np.ones((3, size), np.int32)
    elif not cfg.num_decoder_layers:
        encode = functools.partial(model.module.apply, enable_dropout=False, method="encode")
        jax.eval_shape(encode, {"params": params}, inputs, segments)
    jax.eval_shape(model.loss, params, batch, jax.random.key(0))
    predict = functools.partial(model.predict, max_decode_length=7, num_beams=2)
    jax.eval_shape(predict, params, inputs)


def test_annotations_of_all_modules_hold_in_training_and_decoding(monkeypatch):
    """In traces of networks all of whose axes have different sizes."""
    called = set()

    def recorded(name, function):
        checked = check(function)

        @functools.wraps(function)
        def call(*arguments, **keywords):
            called.add(name)
            return checked(*arguments, **keywords)

        return call

    every = {
        f"{module.__name__}.{name}": (module, name, function)
        for module, functions in FLAX_MODULES.items()
        for name, function in functions.items()
    }
    for key, (module, name, function) in every.items():
        monkeypatch.setattr(module, name, recorded(key, function))
    for cfg in configs():
        trace(cfg)
    alone = FAMILIES["t5"].tiny.encoder_only().replace(head="regression")
    jax.eval_shape(model_for(alone).predict, param_shapes(alone), jnp.ones((3, 11), int))
    assert called == every.keys() - {"Embed.attend"}  # only of tied embeddings
    tied = FAMILIES["t5"].tiny.replace(logits_via_embedding=True)
    trace(tied)
    assert called == every.keys()
    with pytest.raises(VIOLATIONS):
        tied.network().apply({}, jnp.ones((3, 11), int), jnp.ones((3, 5)), jnp.ones((3, 5), int))
