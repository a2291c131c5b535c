"""T5's span corruption, and random windows, as seqio preprocessors.

The algorithm is that of T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): 15 % of the
tokens are noise, in spans of 3 tokens on average; the inputs hold one sentinel for each noise span,
and the targets hold each sentinel followed by the tokens that it stands for. The vocabulary says
which ids are sentinels: for T5 the last ones, for bytes the last bytes, in descending order.
"""

import seqio
import tensorflow as tf

from coda_jax.data.seqio_tasks import plain_vocabulary
from coda_jax.data.vocabularies import ByteVocabulary

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0
BYTES_MEAN_NOISE_SPAN_LENGTH = 20.0  # ByT5's (Xue et al. 2021, arXiv 2105.13626)


def random_spans_helper(
    inputs_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
    most_spans: int | None = None,
) -> tuple[int, int]:
    """Returns the lengths before and after the noise that fill the inputs exactly.

    Args:
        inputs_length: the wanted length of the inputs, sentinels and EOS included.
        noise_density: the share of the tokens that is noise.
        mean_noise_span_length: the mean number of tokens in a noise span.
        most_spans: fewer tokens are taken than fill the inputs if these have more spans; None for
            no limit.

    Returns:
        The number of tokens to take, and the length of the targets, sentinels and EOS included.

    Raises:
        ValueError: the inputs are too short to hold a token, a sentinel and EOS.
    """
    if inputs_length < 4:
        raise ValueError(f"Span corruption needs an inputs length of at least 4: {inputs_length}")

    def lengths(num_tokens: int) -> tuple[int, int]:
        num_noise, num_spans = _num_noise(num_tokens, noise_density, mean_noise_span_length)
        return num_tokens - num_noise + num_spans + 1, num_noise + num_spans + 1

    def fits(num_tokens: int) -> bool:
        _, num_spans = _num_noise(num_tokens, noise_density, mean_noise_span_length)
        in_limit = most_spans is None or num_spans <= most_spans
        return in_limit and lengths(num_tokens)[0] <= inputs_length

    num_tokens = 2
    while fits(num_tokens + 1):
        num_tokens += 1
    return num_tokens, lengths(num_tokens)[1]


def _num_noise(num_tokens: int, density: float, mean_length: float) -> tuple[int, int]:
    """Returns the number of noise tokens and of noise spans among `num_tokens` >= 2 tokens."""
    num_noise = min(max(round(num_tokens * density), 1), num_tokens - 1)
    num_spans = max(round(num_noise / mean_length), 1)
    return num_noise, min(num_spans, num_tokens - num_noise)


def random_spans_noise_mask(
    length: tf.Tensor,
    seeds: tf.Tensor,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tf.Tensor:
    """Draws the tokens to be masked: spans of noise between spans that are kept.

    The number of noise tokens and spans depends on the length only; where they lie is uniform
    over all ways to divide the tokens. The first token is kept and the last is noise.

    Args:
        length: int32 scalar, the number of tokens.
        seeds: int32 [2, 2], two stateless seeds.
        noise_density: the share of the tokens that is noise.
        mean_noise_span_length: the mean number of tokens in a noise span.

    Returns:
        A bool tensor [length], True for noise.
    """
    original_length = length
    length = tf.maximum(length, 2)  # One token cannot be both kept and masked.

    def rounded(x):  # In float64, so that it rounds as `random_spans_helper` does.
        return tf.cast(tf.round(x), tf.int32)

    num_noise = rounded(tf.cast(length, tf.float64) * noise_density)
    num_noise = tf.minimum(tf.maximum(num_noise, 1), length - 1)
    num_spans = tf.maximum(rounded(tf.cast(num_noise, tf.float64) / mean_noise_span_length), 1)
    num_spans = tf.minimum(num_spans, length - num_noise)

    noise_lengths = _random_segmentation(num_noise, num_spans, seeds[0])
    kept_lengths = _random_segmentation(length - num_noise, num_spans, seeds[1])
    interleaved = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
    is_noise = tf.tile([False, True], [num_spans])
    return tf.repeat(is_noise, interleaved)[:original_length]


def _random_segmentation(num_items: tf.Tensor, num_segments: tf.Tensor, seed) -> tf.Tensor:
    """Divides `num_items` into `num_segments` segments of at least one; returns their lengths."""
    starts = tf.cast(tf.range(num_items - 1) < num_segments - 1, tf.int32)
    starts = tf.random.experimental.stateless_shuffle(starts, seed)
    segment = tf.cumsum(tf.pad(starts, [[1, 0]]))
    return tf.math.segment_sum(tf.ones_like(segment), segment)


def noise_span_to_unique_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary
) -> tf.Tensor:
    """Replaces each span of noise by one sentinel.

    Args:
        tokens: int32 [length].
        noise_mask: bool [length].
        vocabulary: it has as many sentinels as there are spans.

    Returns:
        An int32 tensor, shorter than `tokens` by the noise tokens after the first of each span.
    """
    previous_is_noise = tf.pad(noise_mask[:-1], [[1, 0]])
    first_of_span = tf.logical_and(noise_mask, tf.logical_not(previous_is_noise))
    later_in_span = tf.logical_and(noise_mask, previous_is_noise)
    sentinels = tf.constant(plain_vocabulary(vocabulary).sentinel_ids, tokens.dtype)
    span = tf.maximum(tf.cumsum(tf.cast(first_of_span, tf.int32)) - 1, 0)
    tokens = tf.where(first_of_span, tf.gather(sentinels, span), tokens)
    return tf.boolean_mask(tokens, tf.logical_not(later_in_span))


def nonnoise_span_to_unique_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocabulary: seqio.Vocabulary
) -> tf.Tensor:
    """Replaces each span that is not noise by one sentinel; see `noise_span_to_unique_sentinel`."""
    return noise_span_to_unique_sentinel(tokens, tf.logical_not(noise_mask), vocabulary)


def random_window(
    dataset: tf.data.Dataset, output_features, num_tokens: int, prefix: str
) -> tf.data.Dataset:
    """Keeps a random window of the inputs, drawn afresh whenever an example comes.

    Args:
        dataset: examples with int32 "inputs".
        output_features: seqio features.
        num_tokens: of the window; shorter inputs stay whole.
        prefix: text to put before the window.

    Returns:
        A dataset of the same examples with shorter "inputs".
    """
    prefix_tokens = output_features["inputs"].vocabulary.encode_tf(prefix)

    @seqio.map_over_dataset(num_seeds=1)
    def window(example, seed):
        tokens = example["inputs"]
        spare = tf.maximum(tf.size(tokens) - num_tokens, 0)
        start = tf.random.stateless_uniform([], seed, maxval=spare + 1, dtype=tf.int32)
        kept = tokens[start : start + num_tokens]
        return {**example, "inputs": tf.concat([prefix_tokens, kept], axis=0)}

    return window(dataset)


def concatenate_and_split(
    dataset: tf.data.Dataset, segment_length: int, group_size: int = 128
) -> tf.data.Dataset:
    """Joins the "targets" of groups of examples and cuts them into segments.

    Args:
        dataset: examples with int32 "targets".
        segment_length: the number of tokens of a segment; the last of each group may be shorter,
            and is left out if it is a single token, which cannot be both kept and masked.
        group_size: the number of examples that are joined.

    Returns:
        A dataset of examples with "targets" only.
    """
    dataset = dataset.map(lambda x: x["targets"]).ragged_batch(group_size)

    def segments(ragged):
        tokens = ragged.flat_values
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64) - 1, segment_length)
        return starts.map(lambda start: {"targets": tokens[start : start + segment_length]})

    return dataset.flat_map(segments)


def denoise(
    dataset: tf.data.Dataset,
    output_features,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tf.data.Dataset:
    """Turns tokens into noised inputs and the targets that restore them, without EOS.

    Args:
        dataset: examples with int32 "targets".
        output_features: seqio features; the vocabulary of "targets" gives the sentinels.
        noise_density: the share of the tokens that is noise.
        mean_noise_span_length: the mean number of tokens in a noise span.

    Returns:
        A dataset with "inputs" and "targets"; the noise is fresh in each epoch and follows the
        seed.
    """
    vocabulary = output_features["targets"].vocabulary

    @seqio.map_over_dataset(num_seeds=2)
    def noise(example, seeds):
        tokens = example["targets"]
        mask = random_spans_noise_mask(
            tf.size(tokens), seeds, noise_density, mean_noise_span_length
        )
        return {
            "inputs": noise_span_to_unique_sentinel(tokens, mask, vocabulary),
            "targets": nonnoise_span_to_unique_sentinel(tokens, mask, vocabulary),
        }

    return noise(dataset)


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length,
    output_features,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float | None = None,
) -> tf.data.Dataset:
    """T5's pretraining task on tokenised texts; EOS is to be appended afterwards.

    Args:
        dataset: examples with int32 "targets": whole texts.
        sequence_length: the lengths of "inputs" and "targets"; the inputs get exactly that length
            (EOS included), save where a group of texts ends.
        output_features: seqio features.
        noise_density: the share of the tokens that is noise.
        mean_noise_span_length: the mean number of tokens in a noise span; None: T5's 3, and
            ByT5's 20 for bytes.

    Returns:
        A dataset with "inputs" and "targets".

    Raises:
        ValueError: no length given, targets too short for the noise, or fewer sentinels than spans.
    """
    if not sequence_length or not sequence_length.get("inputs"):
        raise ValueError(f"Span corruption needs the length of the inputs: {sequence_length}")
    vocabulary = plain_vocabulary(output_features["targets"].vocabulary)
    if mean_noise_span_length is None:
        is_bytes = isinstance(vocabulary, ByteVocabulary)
        mean_noise_span_length = (
            BYTES_MEAN_NOISE_SPAN_LENGTH if is_bytes else MEAN_NOISE_SPAN_LENGTH
        )
    num_tokens, targets_length = random_spans_helper(
        sequence_length["inputs"], noise_density, mean_noise_span_length
    )
    check_targets_length(targets_length, sequence_length)
    _, num_spans = _num_noise(num_tokens, noise_density, mean_noise_span_length)
    sentinels = len(vocabulary.sentinel_ids)
    if num_spans > sentinels:
        raise ValueError(f"{num_spans} noise spans need as many sentinels; there are {sentinels}")
    dataset = concatenate_and_split(dataset, num_tokens)
    return denoise(dataset, output_features, noise_density, mean_noise_span_length)


def check_targets_length(needed: int, sequence_length) -> None:
    """Raises ValueError where targets are longer than their limit, which would cut them."""
    if sequence_length.get("targets") and needed > sequence_length["targets"]:
        raise ValueError(
            f"Inputs of length {sequence_length['inputs']} have targets of length {needed}, but "
            f"the targets length is {sequence_length['targets']}"
        )
