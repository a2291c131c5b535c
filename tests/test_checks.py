"""Every option of every record, and every number of a function that gin files name, has a range.

Whatever is given is either of the option's type and finite, or a ValueError that names the option.
"""

import argparse
import dataclasses
import inspect
import math
import pathlib
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import checks
from coda_jax.checkpoints.config_json import _is_of, from_json, to_json
from coda_jax.commands import bench, loading
from coda_jax.data.source import Data
from coda_jax.inference import Decoding
from coda_jax.methods import METHODS, Coda
from coda_jax.methods.soft_topk import soft_topk
from coda_jax.models import FAMILIES, preset
from coda_jax.objectives import BestRQConfig, Generation, model_for
from coda_jax.profiling.timing import time_interleaved
from coda_jax.training import optimizers, schedules
from coda_jax.training.trainer import TrainOptions

NAN, INF = float("nan"), float("inf")
TINY = {name: family.tiny for name, family in FAMILIES.items()}
RECORDS = {  # {name: what makes it, from some of its fields}
    **{method.__name__: method for method in METHODS.values()},
    **{type(tiny).__name__: tiny.replace for tiny in TINY.values()},
    "Generation": Generation,
    "Decoding": Decoding,
    "BestRQConfig": BestRQConfig,
    "TrainOptions": lambda **given: TrainOptions(**{"total_steps": 10} | given),
    "Data": lambda **given: Data(**{"feature_lengths": {"inputs": 8, "targets": 4}} | given),
}
FIELDS = [
    (name, field.name, field.type)
    for name, make in RECORDS.items()
    for field in dataclasses.fields(make())
]
FUNCTIONS = {  # that gin files name, and the operator; with what must be given
    schedules.warmup_cosine: {"peak_value": 0.1, "total_steps": 100},
    optimizers.adamw: {"learning_rate": 0.1},
    optimizers.adafactor: {"learning_rate": 0.1},
    loading.configured_preset: {"name": "t5_1_1_small"},
    soft_topk: {"scores": jnp.ones(4), "k": 2},
}
GIVEN = ("scores", "mask", "segment_ids", "name")  # arrays, and a name with an error of its own
ARGUMENTS = [
    (function, name)
    for function in FUNCTIONS
    for name in inspect.signature(function).parameters
    if name not in GIVEN
]
WORDS = ["", "0.1", "float16", "relu", "linear", "exact", "loss", "never", "(", "classification"]
SCALARS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.sampled_from([0.5, -0.0, 1e-46, 10**400, np.float32(2), np.int64(3), np.bool_(True)]),
    st.booleans(),
    st.sampled_from(WORDS),
    st.text(max_size=3),
    st.none(),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.lists(SCALARS, max_size=3).map(tuple)


def finite(value):
    """Whether all numbers in a value are."""
    if isinstance(value, tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def made(make, name, value):
    """What is made of the value; None where it is refused by an error that names the option."""
    try:
        return make(**{name: value})
    except ValueError as error:
        text = str(error)
        assert re.search(rf"(?<![A-Za-z])({name}|{name.upper()})\b", text), text
        assert text.count("\n") < 3 and len(text) < 400, text
        return None


@pytest.mark.parametrize("value", [7, 0.5, True, b"a", "", ["a"]])
def test_what_is_no_path_is_refused(value):
    checks.paths(OUTPUT=None, INPUT="a", MODEL_DIR=pathlib.Path("a"))
    with pytest.raises(ValueError, match=r"^OUTPUT must be the name of a file or folder, got "):
        checks.paths(INPUT="a", OUTPUT=value)


@pytest.mark.parametrize("record, name, kind", FIELDS, ids=lambda x: x if type(x) is str else "")
@settings(max_examples=25)
@given(value=VALUES)
@example(value=NAN)
@example(value=INF)
@example(value=-1)
@example(value=0)
@example(value=True)
@example(value="0.1")
def test_an_option_is_of_its_type_and_finite_or_refused(record, name, kind, value):
    found = made(RECORDS[record], name, value)
    if found is None:
        return
    kept = getattr(found, name)
    assert _is_of(kind, kept) and finite(kept), (value, kept)
    if hasattr(found, "methods"):
        assert from_json(to_json(found), "here") == found


@pytest.mark.parametrize("function, name", ARGUMENTS, ids=lambda x: getattr(x, "__name__", x))
@settings(max_examples=15)
@given(value=VALUES)
@example(value=NAN)
@example(value=INF)
@example(value=-1)
@example(value=0)
@example(value="0.1")
def test_an_argument_is_refused_by_its_name_or_gives_numbers(function, name, value):
    found = made(lambda **more: function(**FUNCTIONS[function] | more), name, value)
    if function is soft_topk and found is not None:
        assert jnp.isfinite(found).all()


REFUSED = [
    (Coda, {"epsilon": 0}, "Coda.epsilon must be a number from 1e-06 to 1000000.0, got 0"),
    (Coda, {"reduction": 0.5}, "Coda.reduction must be a number from 1 to 1000000, got 0.5"),
    (Coda, {"reduction": (3, NAN)}, r"Coda.reduction\[1\] must be a finite number from 1 to"),
    (Coda, {"reduction": "3"}, "Coda.reduction must be a number from .*, got '3', a text"),
    (METHODS["lora"], {"targets": "query"}, "Lora.targets must be a tuple that is not empty"),
    (METHODS["lora"], {"targets": ("(",)}, r"Lora.targets\[0\] must be a regular expression"),
    (RECORDS["TrainOptions"], {"max_grad_norm": -1}, "max_grad_norm must be a number above 0, got"),
    (RECORDS["TrainOptions"], {"max_grad_norm": 0}, "max_grad_norm must be a number above 0, got"),
    (RECORDS["TrainOptions"], {"keep": True}, "keep must be a whole number .*, got True"),
    (RECORDS["TrainOptions"], {"seed": 2**32}, "seed must be a whole number from 0 to 4294967295"),
    (TINY["t5"].replace, {"dropout_rate": 1}, "must be a number of at least 0 and below 1, got 1"),
    (TINY["t5"].replace, {"dropout_rate": 1 - 1e-12}, "got 0.999999999999, in float32 1.0"),
    (TINY["t5"].replace, {"num_heads": 0}, "T5Config.num_heads must be a whole number of at least"),
    (TINY["t5"].replace, {"eos_id": 20}, "T5Config.eos_id must be below vocab_size=20, got 20"),
    (TINY["t5"].replace, {"relpos_max_distance": 4}, "above half of relpos_num_buckets=8, got 4"),
    (TINY["t5"].replace, {"mlp_activations": ("gleu",)}, r"mlp_activations\[0\] must be one of"),
    (Decoding, {"temperature": NAN}, "Decoding.temperature must be a finite number of at least"),
    (Data, {"feature_lengths": {"input": 8}}, "feature_lengths must be lengths such as"),
    (preset, {"name": "t5_1_1_small", "vocab_szie": 9}, r"did you mean one of \['vocab_size'\]"),
    (loading.configured_preset, {"name": "x", "changes": 3}, "PRESET_CHANGES must be a dictionary"),
    (loading.load_model, {"config": TINY["t5"], "seed": -1}, "SEED must be a whole number from 0"),
    (model_for, {"config": TINY["t5"], "z_loss": -1}, "Z_LOSS must be a number of at least 0"),
    (optimizers.adamw, {"learning_rate": 1, "weight_decay": -1}, "weight_decay must be a number"),
    (time_interleaved, {"functions": {}, "rounds": 1, "warm_up": -1}, "warm_up must be a whole"),
]  # fmt: skip


@pytest.mark.parametrize("make, values, message", REFUSED, ids=[row[2][:50] for row in REFUSED])
def test_what_has_no_meaning_is_refused_in_one_line(make, values, message):
    with pytest.raises(ValueError, match=message) as refused:
        make(**values)
    assert "\n" not in str(refused.value)


def test_numbers_of_numpy_and_jax_are_numbers():
    assert checks.COUNT("n", np.int64(3)) == 3 and type(checks.COUNT("n", np.int64(3))) is int
    assert type(Coda(np.float32(2.5)).reduction) is float
    assert checks.Number(above=0)("n", jnp.float32(0.5)) == 0.5
    assert checks.OneOf((False, True, "never"))("n", np.bool_(True)) is True
    with pytest.raises(ValueError, match="got 0"):
        checks.OneOf((False, True, "never"))("n", 0)


@pytest.mark.parametrize("value", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_a_dtype_may_be_a_name_or_a_type(value):
    assert checks.dtype("dtype", value) is jnp.bfloat16
    assert TINY["t5"].replace(dtype=value).dtype is jnp.bfloat16


@pytest.mark.parametrize("value", ["float16", np.float16, jnp.float16, "half"])
def test_float16_is_refused_with_the_reason(value):
    reason = "must be 'float32' or 'bfloat16', got 'float16': values of a T5 leave its range"
    with pytest.raises(ValueError, match=f"T5Config.dtype {reason}"):
        TINY["t5"].replace(dtype=value)
    with pytest.raises(ValueError, match=f"DTYPE {reason}"):  # before anything is read
        loading.load_model("no such checkpoint", dtype=value)
    with pytest.raises(ValueError, match=f"export_dtype {reason}"):
        checks.dtype("export_dtype", value)


@pytest.mark.parametrize("value", ["int8", "float", "float64", float, int, None, "nonsense", 3, []])
def test_other_dtypes_are_refused_too(value):
    with pytest.raises(ValueError, match="must be 'float32' or 'bfloat16', got "):
        TINY["t5"].replace(dtype=value)


@pytest.mark.parametrize(
    "flag",
    ["input_length=0", "batch_size=-1", "target_length=1.5", "rounds=0", "reductions=0.5",
     "reductions=", "reductions=3,,5", "reductions=nan", "reductions=x", "measures=speed",
     "measures=", "dtype=float16", "preset=t5"],
)  # fmt: skip
def test_the_flags_of_bench_are_checked_where_they_enter(flag):
    parser = argparse.ArgumentParser(exit_on_error=False)
    bench.add_flags(parser)
    with pytest.raises(argparse.ArgumentError, match=f"--{flag.split('=')[0]}"):
        parser.parse_args([f"--{flag}"])


def test_the_flags_of_bench_are_read():
    parser = argparse.ArgumentParser(exit_on_error=False)
    bench.add_flags(parser)
    assert parser.parse_args([]).reductions == (3.0, 5.0)
    options = parser.parse_args(["--reductions=2,2.5", "--measures=encoder", "--rounds=3"])
    assert (options.reductions, options.measures) == ((2.0, 2.5), ("encoder",))
    assert options.rounds == 3


@pytest.mark.parametrize(
    "text",
    ["(a+)+$", "(.*)*x", "(a|a)*b", "(a?){30}b", ".*" * 5, "a?" * 9, "(?:(x)*y)+", "(a*+b)*+c",
     "(?:){4000000000}", "(?:(?=e)){4000000000}", "(?:(?:){65535}){65535}x"],
)  # fmt: skip
def test_a_pattern_that_may_take_for_ever_is_refused(text):
    with pytest.raises(ValueError, match=r"targets must be a regular expression with at most 4"):
        checks.pattern("targets", text)


@pytest.mark.parametrize(
    "text",
    [
        r"attention/(query|value)$",
        r"^(encoder|decoder)/layers_\d+/(self_)?attention/(query|key|value|out)/kernel$",
        r"layers_[0-3]/.*/wi(_\d)?$",
        r"(ab){3}x{2,5}",
        "(?=a)b|(?!c)d",
    ],
)
def test_patterns_of_paths_are_taken(text):
    assert checks.pattern("targets", text) == text
