"""CTranslate2. It has no call for a T5's encoder alone."""

import ctranslate2
import numpy as np

from benchmarks.peers.engine import CTRANSLATE2, THREADS, Case, Engine


def load(case: Case, precision: str) -> Engine:
    """CTranslate2 with weights in "float32" or "int8"."""
    translator = ctranslate2.Translator(
        str(case.folder / CTRANSLATE2.format(precision)),
        device="cpu",
        compute_type=precision,
        inter_threads=1,
        intra_threads=THREADS,
    )
    tokens = [[f"t{number}" for number in row] for row in case.inputs]

    def generate(length):
        results = translator.translate_batch(
            tokens,
            beam_size=1,
            max_input_length=0,
            max_decoding_length=length,
            min_decoding_length=length,
        )
        return np.array([[int(token[1:]) for token in row.hypotheses[0]] for row in results])

    return Engine(None, generate)
