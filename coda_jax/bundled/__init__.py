"""Files that come with the package: small checkpoints in Hugging Face layout and a vocabulary.

`DENSE` is a T5 v1.1 pretrained on Python's standard library; `CODA` is the same after conditional
pretraining, its adapters and routers in the folder `adapter`. Their README.md are model cards.
"""

import pathlib

_FOLDER = pathlib.Path(__file__).parent

VOCABULARY = _FOLDER / "stdlib_vocabulary"
DENSE = _FOLDER / "stdlib_t5"
CODA = _FOLDER / "stdlib_t5_coda"
