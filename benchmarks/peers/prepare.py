"""Random T5 v1.1 weights for all engines: a Hugging Face folder, and CTranslate2's from it.

    python -m benchmarks.peers.prepare FOLDER --preset=t5_1_1_base

The columns of the output layer differ in size as exp(z), z normal, so that the best logit is far
ahead of the second: with columns of equal size rounding alone would decide many tokens. Padding and
end token have columns of zeros: no engine ends before the last place.
"""

import argparse
import pathlib

from ctranslate2.converters import TransformersConverter
import jax
import numpy as np
from tokenizers import Tokenizer, models
import transformers

from benchmarks.peers.engine import CTRANSLATE2, HUGGING_FACE
from coda_jax import checkpoints
from coda_jax.models import ModelConfig, preset
from coda_jax.objectives import model_for

PRECISIONS = ("float32", "int8")


def random_params(config: ModelConfig) -> dict:
    """Random weights whose greedy tokens are decided; see the head of this file."""
    params = jax.jit(model_for(config).init)(jax.random.key(0))
    size = np.exp(np.random.default_rng(0).normal(size=config.vocab_size))
    size[[config.pad_id, config.eos_id]] = 0
    output = params["decoder"]["logits_dense"]
    output["kernel"] = np.asarray(output["kernel"] * size, np.float32)
    return params


def save_tokenizer(folder: pathlib.Path, config: ModelConfig) -> None:
    """A vocabulary whose tokens are "t0", "t1", ...: CTranslate2 takes tokens, not numbers."""
    words = {f"t{number}": number for number in range(config.vocab_size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")),
        pad_token=f"t{config.pad_id}",
        eos_token=f"t{config.eos_id}",
        unk_token="t2",
    )
    tokenizer.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--preset", default="t5_1_1_base")
    options = parser.parse_args()
    config = preset(options.preset, dropout_rate=0.0)
    source = options.folder / HUGGING_FACE
    checkpoints.save_hf(source, config, random_params(config))
    save_tokenizer(source, config)
    for precision in PRECISIONS:
        converter = TransformersConverter(str(source))
        target = options.folder / CTRANSLATE2.format(precision)
        converter.convert(str(target), quantization=precision, force=True)


if __name__ == "__main__":
    main()
