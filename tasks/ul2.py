"""UL2's seven denoisers, of which a mixture is made (Tay et al. 2022, arXiv 2205.05131, table 1).

R masks a little, in short spans; X masks much of the text, or long spans; S asks for the end of a
text. Each puts its mode in front of the inputs, as a text, which the public checkpoints know.
"""

import dataclasses

import seqio
import tensorflow as tf

from coda_jax.data.seqio_tasks import plain_vocabulary
from coda_jax.tasks import preprocessors


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """How a text is corrupted.

    Attributes:
        mode: the text in front of the inputs.
        noise_density: the share of the tokens that is to be restored; of a suffix, in the mean.
        mean_noise_span_length: of the spans in tokens; None for a suffix.
    """

    mode: str
    noise_density: float
    mean_noise_span_length: float | None


R, S, X = "[NLU]", "[S2S]", "[NLG]"
DENOISERS = {
    "r_3": Denoiser(R, 0.15, 3.0),
    "r_8": Denoiser(R, 0.15, 8.0),
    "s": Denoiser(S, 0.25, None),
    "x_3": Denoiser(X, 0.5, 3.0),
    "x_8": Denoiser(X, 0.5, 8.0),
    "x_64": Denoiser(X, 0.5, 64.0),
    "x_64_sparse": Denoiser(X, 0.15, 64.0),
}


def corrupted(
    dataset: tf.data.Dataset, sequence_length, output_features, denoiser: Denoiser
) -> tf.data.Dataset:
    """Turns tokenised texts into inputs with a mode in front, and targets; EOS comes afterwards.

    The inputs get their length, EOS included, unless the spans would be more than the sentinels,
    as those of 3 tokens are with T5's 100: then they are shorter.

    Args:
        dataset: examples with int32 "targets": whole texts.
        sequence_length: the lengths of "inputs" and "targets".
        output_features: seqio features.
        denoiser: of `DENOISERS`.

    Returns:
        A dataset with "inputs" and "targets".

    Raises:
        ValueError: no length given, or one that is too short.
    """
    if not sequence_length or not sequence_length.get("inputs"):
        raise ValueError(f"A denoiser needs the length of the inputs: {sequence_length}")
    vocabulary = output_features["targets"].vocabulary
    mode = tf.constant(vocabulary.encode(denoiser.mode), tf.int32)
    room = sequence_length["inputs"] - len(mode)
    if room < 4:
        raise ValueError(
            f"UL2's denoisers need an inputs length of at least {len(mode) + 4}, got "
            f"{sequence_length['inputs']}"
        )
    if denoiser.mean_noise_span_length is None:
        preprocessors.check_targets_length(room // 2 + 1, sequence_length)
        noised = suffixes(preprocessors.concatenate_and_split(dataset, room))
    else:
        noise = denoiser.noise_density, denoiser.mean_noise_span_length
        sentinels = len(plain_vocabulary(vocabulary).sentinel_ids)
        num_tokens, needed = preprocessors.random_spans_helper(room, *noise, sentinels)
        preprocessors.check_targets_length(needed, sequence_length)
        segments = preprocessors.concatenate_and_split(dataset, num_tokens)
        noised = preprocessors.denoise(segments, output_features, *noise)
    return noised.map(lambda x: {**x, "inputs": tf.concat([mode, x["inputs"]], axis=0)})


@seqio.map_over_dataset(num_seeds=1)
def suffixes(example, seed):
    """Cuts "targets" in two: a prefix as inputs, and a suffix of 1 token to half of them.

    The suffix is a quarter of the tokens in the mean. There is no sentinel, as in the paper's code.
    """
    tokens = example["targets"]
    half = tf.size(tokens) // 2
    cut = tf.size(tokens) - tf.random.stateless_uniform([], seed, 1, half + 1, tf.int32)
    return {"inputs": tokens[:cut], "targets": tokens[cut:]}
