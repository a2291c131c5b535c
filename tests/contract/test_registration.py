"""The tables: what a method is, how methods are combined, and which cases `make test` runs."""

import dataclasses
import itertools
import json

from contract.table import (
    CASES,
    DENSE,
    GROUPS,
    adaptations,
    default_cases,
    each_case,
    each_family,
    routed,
)
import pytest

import coda_jax
from coda_jax import methods
from coda_jax.checkpoints import config_json
from coda_jax.methods import METHODS, Method
from coda_jax.models import FAMILIES, family_of, find, preset

each_method = pytest.mark.parametrize("name", METHODS)


def test_default_cases_have_every_family_and_method_in_every_contract():
    """Of all that a group may run, each family with routing too; and each method in each family."""
    default = default_cases()
    for name, group in GROUPS.items():
        covered = [case for case in CASES if group.covers(case)]
        assert set(default[name]) <= set(covered)
        assert {case.family for case in default[name]} == {case.family for case in covered}
        if group.methods:
            assert {case.method for case in default[name]} == {case.method for case in covered}
            assert {case.family for case in filter(routed, default[name])} == set(FAMILIES)
    every = set(itertools.chain(*default.values()))
    assert {(case.family, case.method) for case in every} == {
        (case.family, case.method) for case in CASES
    }
    assert {case.example for case in every} == {case.example for case in CASES}
    assert {case.method for case in every if routed(case)} == {*METHODS}


def test_the_cases_are_the_full_product():
    assert len(CASES) == len(set(map(str, CASES))) == len(FAMILIES) * len(adaptations())
    assert {case.method for case in CASES} == {*METHODS, DENSE}


@each_method
def test_a_method_is_a_frozen_dataclass_under_its_name(name):
    method = METHODS[name]
    assert method.name == name and issubclass(method, Method)
    assert methods.find(name) is method and getattr(coda_jax, method.__name__) is method
    assert {type(example) for example in method.examples()} == {method}
    for example in method.examples():
        assert dataclasses.replace(example) == example
        assert hash(example) == hash(dataclasses.replace(example))
        assert example.continues(example)
        for field in dataclasses.fields(example):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(example, field.name, None)


@each_method
def test_two_of_a_kind_are_refused(name):
    tiny, method = next(iter(FAMILIES.values())).tiny, METHODS[name].examples()[0]
    with pytest.raises(ValueError, match=rf"different kinds, got two of \['{name}'\]"):
        tiny.replace(methods=(method, method))


def test_methods_that_are_not_in_the_table_are_refused():
    tiny = next(iter(FAMILIES.values())).tiny

    class Unknown(Method):
        """In no table."""

        name = "unknown"

    with pytest.raises(ValueError, match="method 'unknown' is unknown; it must be one of"):
        tiny.replace(methods=(Unknown(),))
    with pytest.raises(ValueError, match="must be methods such as those of METHODS, got 'a name'"):
        tiny.replace(methods=("a name",))
    with pytest.raises(ValueError, match="no_such_method"):
        methods.find("no_such_method")


@each_family
def test_the_order_in_which_methods_are_given_does_not_matter(family):
    """They are put into the order of the table."""
    every = [method.examples()[0] for method in METHODS.values()]
    tiny = FAMILIES[family].tiny
    expected = tiny.replace(methods=tuple(every))
    assert list(expected.methods) == every
    assert tiny.replace(methods=tuple(reversed(every))) == expected


@each_case("parameters")
def test_a_config_is_the_same_after_json(case):
    """The one codec, with every field of its methods."""
    values = json.loads(json.dumps(config_json.to_json(case.config)))
    assert config_json.from_json(values, "a test") == case.config


@each_family
def test_a_family_is_found_by_its_name_and_by_its_configs(family):
    record = FAMILIES[family]
    assert record.name == family and find(family, "a test") is record
    assert family_of(record.tiny) is record and type(record.tiny) is record.config
    for name, config in record.presets.items():
        assert preset(name) == config and type(config) is record.config
    assert record.objectives(record.tiny)
    with pytest.raises(ValueError, match=f"a test: family='no_{family}' is unknown"):
        find(f"no_{family}", "a test")
