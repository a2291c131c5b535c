"""Span corruption, or UL2's denoisers, over texts of one's own: the data of pretraining.

`task` registers it for a vocabulary, whose sentinels are those of the checkpoint: T5's, mT5's and
umT5's <extra_id_0> ..., ByT5's last bytes.
"""

from collections.abc import Callable, Sequence
import functools

import seqio
import tensorflow as tf

from coda_jax import checks
from coda_jax.data import seqio_tasks
from coda_jax.tasks import preprocessors, registry, texts, ul2

SHUFFLE_BUFFER_SIZE = 1000  # segments
SPAN_CORRUPTION, UL2 = "span_corruption", "ul2"


def task(
    vocabulary: str,
    *,
    files: str | Sequence[str] | None = None,
    tfds_name: str | None = None,
    seqio_name: str | None = None,
    field: str = "text",
    denoisers: str = SPAN_CORRUPTION,
    noise_density: float | None = None,
    mean_noise_span_length: float | None = None,
) -> str:
    """Registers the task, once, and returns the name that it has in seqio. For gin files.

    Args:
        vocabulary: a path, or "bytes", for `seqio_tasks.seqio_vocabulary`.
        files: see `texts.sources`, as for the next three.
        tfds_name: a TFDS data set.
        seqio_name: a task or mixture of seqio.
        field: of the records, a text.
        denoisers: "span_corruption" (T5's), or "ul2", a mixture of the seven of `ul2.DENOISERS`.
        noise_density: the share of the tokens that is noise; None: 0.15.
        mean_noise_span_length: in tokens; None: 3, and 20 for bytes.

    Returns:
        "pretrain_text", with a number appended where other arguments have that name.

    Raises:
        FileNotFoundError: no files match, or there is no such vocabulary.
        ValueError: as for `texts.sources`; a vocabulary without sentinels; an option that is not
            allowed, or that UL2's denoisers do not have.
    """
    known = seqio_tasks.seqio_vocabulary(vocabulary)
    steps = _steps(
        known,
        vocabulary,
        denoisers,
        noise_density,
        mean_noise_span_length,
    )
    needed = texts.Needed(
        lambda text: tf.size(known.encode_tf(text)) > 1,
        "no text has two tokens, of which one could be masked and the other kept",
    )
    found = texts.sources(files, tfds_name, seqio_name, field, needed, streams=len(steps))

    def add(registered: str) -> seqio.Task | seqio.Mixture:
        parts = {
            "_".join(filter(None, (name, part))): (
                functools.partial(_add, source, noise, vocabulary),
                rate,
            )
            for part, (streams, rate) in found.items()
            for (name, noise), source in zip(steps.items(), streams, strict=True)
        }
        return registry.add_mixed(registered, parts)

    arguments = (vocabulary, files, tfds_name, seqio_name, field, denoisers)
    options = (noise_density, mean_noise_span_length)
    return registry.once("pretrain_text", (*arguments, *options), add)


def _steps(
    vocabulary: seqio.Vocabulary,
    path: str,
    denoisers: str,
    density: float | None,
    mean_length: float | None,
) -> dict[str, Callable]:
    """{name: seqio preprocessor of tokens} of the denoisers."""
    checks.OneOf((SPAN_CORRUPTION, UL2))("DENOISERS", denoisers)
    if not seqio_tasks.plain_vocabulary(vocabulary).sentinel_ids:
        raise ValueError(
            f"VOCABULARY={path!r} has no sentinels, <extra_id_0> and so on, with which spans are "
            "masked: a model that never saw any cannot be pretrained so"
        )
    if denoisers == UL2:
        if density is not None or mean_length is not None:
            raise ValueError(
                "DENOISERS='ul2' has densities and spans of its own: NOISE_DENSITY and "
                "MEAN_NOISE_SPAN_LENGTH must be None"
            )
        named = ul2.DENOISERS.items()
        return {name: functools.partial(ul2.corrupted, denoiser=row) for name, row in named}
    density = preprocessors.NOISE_DENSITY if density is None else density
    noise = functools.partial(
        preprocessors.span_corruption,
        noise_density=checks.Number(above=0, below=1)("NOISE_DENSITY", density),
        mean_noise_span_length=checks.Maybe(checks.Number(least=1))(
            "MEAN_NOISE_SPAN_LENGTH", mean_length
        ),
    )
    return {SPAN_CORRUPTION: noise}


def _add(source: seqio.DataSource, noise: Callable, vocabulary: str, name: str) -> seqio.Task:
    steps = [
        functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        _maskable,
        seqio.CacheDatasetPlaceholder(),
        noise,
    ]
    return seqio_tasks.add_task(
        name,
        source,
        steps,
        seqio_tasks.seqio_vocabulary(vocabulary),
        metric_fns=(),
        shuffle_buffer_size=SHUFFLE_BUFFER_SIZE,
    )


def _maskable(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Leaves out texts of one token or none."""
    return dataset.filter(lambda example: tf.size(example["targets"]) > 1)
