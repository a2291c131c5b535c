"""What all tables of tasks share: unknown names are refused, and a task is registered once."""

import pytest
import seqio

from coda_jax.data.seqio_tasks import MemorySource, add_task, seqio_vocabulary
from coda_jax.tasks import registry


def test_an_unknown_name_is_refused_and_the_known_are_named():
    assert registry.find("language", "a", {"a": 1}) == 1
    with pytest.raises(ValueError, match=r"There is no language task 'c', only \['a', 'b'\]"):
        registry.find("language", "c", {"b": 1, "a": 2})


def test_a_task_is_registered_once_for_its_arguments():
    added = []

    def add(name):
        added.append(name)
        source = MemorySource(lambda split: {"inputs": ["a"], "targets": ["b"]}, ["train"])
        steps = [seqio.preprocessors.tokenize]
        return add_task(name, source, steps, seqio_vocabulary("bytes"))

    name = registry.once("mine", ("bytes", 1), add)
    assert name == registry.once("mine", ("bytes", 1), add)
    assert name != registry.once("mine", ("bytes", 2), add)
    assert added[0] == name and len(added) == 2


def test_names_are_those_of_the_table_and_numbered_where_they_mean_another_task():
    first = registry.once("entailment", ("bytes", None), lambda name: None)
    assert first == "entailment"
    assert registry.once("entailment", ("other", None), lambda name: None) == "entailment_2"
