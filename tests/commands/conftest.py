"""What the tests of commands share."""

import gin
import pytest


@pytest.fixture(autouse=True)
def clean_gin():
    """Leaves no configuration behind."""
    yield
    gin.clear_config()
