"""The step of seqio tasks that reads recordings; `coda_jax.data.audio` makes the frames."""

from collections.abc import Callable

import seqio
import tensorflow as tf

from coda_jax.data.audio import frames, read_audio


def load_audio() -> Callable:
    """Returns the seqio preprocessor that turns "audio", a file, into frames as "inputs"."""

    def load(path):
        return read_audio(path.decode())

    @seqio.map_over_dataset
    def read(example):
        example = dict(example)
        samples = tf.numpy_function(load, [example.pop("audio")], tf.float32)
        return {**example, "inputs": frames(tf.ensure_shape(samples, [None]))}

    return read
