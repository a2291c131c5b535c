"""seqio's feature converters: a task's examples to batches, whose rows hold what a model can take.

The module imports seqio and TensorFlow, so that it is imported where it is needed alone.
"""

from collections.abc import Mapping
from typing import ClassVar

from coda_jax import checks
from coda_jax.optional import needs

with needs():
    import seqio
    import tensorflow as tf

_COUNT = "segments"  # a feature with one value for each example


class TokensFeatureConverter(seqio.EncDecFeatureConverter):
    """seqio's converter for texts, with at most so many of them in a packed row."""

    def __init__(self, max_segments: int | None = None, **kwargs):
        """Makes the converter.

        Args:
            max_segments: the most examples in a row; None for no limit.
            **kwargs: seqio's.
        """
        super().__init__(**kwargs)
        self._max_segments = checks.Maybe(checks.COUNT)("max_segments", max_segments)

    def _pack_or_pad(
        self, ds: tf.data.Dataset, packed_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Packs as seqio does, for which a row is full of examples when it is full of counts."""
        if not self.pack or self._max_segments is None:
            return super()._pack_or_pad(ds, packed_lengths)
        counted = ds.map(lambda example: {**example, _COUNT: tf.ones([1], tf.int32)})
        return super()._pack_or_pad(counted, {**packed_lengths, _COUNT: self._max_segments})


class VectorsFeatureConverter(seqio.EncDecFeatureConverter):
    """seqio's converter for inputs that are float vectors [length, C], as of patches; unpacked."""

    TASK_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.TASK_FEATURES,
        "inputs": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=2),
    }
    MODEL_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "encoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=2),
    }

    def __init__(self, pack: bool = False, **kwargs):
        """Makes the converter.

        Args:
            pack: whether examples share rows, which they cannot.
            **kwargs: seqio's.

        Raises:
            ValueError: they are to be packed.
        """
        if pack:
            raise ValueError(
                "images and recordings are not packed: pack=True; t5x/images.gin and "
                "t5x/speech.gin, given right after the run's file, set DatasetConfig.pack = False"
            )
        super().__init__(pack=False, **kwargs)
