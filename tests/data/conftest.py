"""What the tests of data share."""

from pathlib import Path
import shutil

import pytest
from tokenizer_folders import FOLDER


@pytest.fixture
def copied(tmp_path):
    """A function that copies a folder of a small tokenizer and returns the copy."""
    return lambda name: Path(shutil.copytree(FOLDER / name, tmp_path / name))
