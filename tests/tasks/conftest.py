"""What the tests of tasks share."""

import pytest
import seqio

REGISTRIES = (seqio.MixtureRegistry, seqio.TaskRegistry)


@pytest.fixture(autouse=True)
def forget_tasks():
    """Removes what a test has registered."""
    before = [set(registry.names()) for registry in REGISTRIES]
    yield
    for registry, names in zip(REGISTRIES, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)
