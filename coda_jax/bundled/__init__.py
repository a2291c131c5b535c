"""Files that come with the package: small checkpoints in Hugging Face layout and a vocabulary.

`DENSE` is a T5 v1.1 pretrained on Python's standard library, `DENSE_IMAGES` a Pix2Struct pretrained
on printed letters, `DENSE_SPEECH` a speech encoder with a CTC head pretrained on spoken digits.
`CODA`, `CODA_IMAGES` and `CODA_SPEECH` are the same after conditional pretraining, their adapters
and routers in the folder `adapter`. The README.md of each is a model card.
"""

import pathlib

_FOLDER = pathlib.Path(__file__).parent

VOCABULARY = _FOLDER / "stdlib_vocabulary"
DENSE = _FOLDER / "stdlib_t5"
CODA = _FOLDER / "stdlib_t5_coda"
DENSE_IMAGES = _FOLDER / "rendered_pix2struct"
CODA_IMAGES = _FOLDER / "rendered_pix2struct_coda"
DENSE_SPEECH = _FOLDER / "spoken_w2v_bert"
CODA_SPEECH = _FOLDER / "spoken_w2v_bert_coda"
