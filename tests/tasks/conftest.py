"""What the tests of tasks share."""

import pytest
import seqio


@pytest.fixture(autouse=True)
def forget_tasks():
    """Removes what a test has registered."""
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)
