"""What is timed of every engine.

Axis letters: B batch, N input tokens, D embedding, T target tokens.
"""

from collections.abc import Callable
import dataclasses
import pathlib

import numpy as np

THREADS = 2
HUGGING_FACE, CTRANSLATE2, ONNX = "hugging_face", "ctranslate2_{}", "onnx_{}"  # folders


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        folder: of `benchmarks.peers.prepare`.
        inputs: int32 [B, N], full rows.
    """

    folder: pathlib.Path
    inputs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine, loaded for one case.

    Attributes:
        encode: gives float32 [B, N, D]; None if the engine does not give this out.
        generate: of T, gives int [B, T], greedy, without the start token; None if the engine has
            no decoding loop.
    """

    encode: Callable[[], np.ndarray] | None
    generate: Callable[[int], np.ndarray] | None
