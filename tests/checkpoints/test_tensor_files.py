"""Safetensors files are the same bytes whenever they are written."""

import numpy as np

from coda_jax.checkpoints.tensor_files import read_tensors, write_tensors


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """The library writes metadata in an order of its own in each call."""
    tensors = {name: np.arange(3, dtype=np.float32) for name in ("b/ä", 'a "c"', "é")}
    file, found = tmp_path / "x.safetensors", set()
    for _ in range(30):
        write_tensors(file, tensors)
        found.add(file.read_bytes())
    assert len(found) == 1
    assert read_tensors(file).keys() == tensors.keys()
