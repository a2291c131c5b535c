"""Files that come with the package: a vocabulary and, in a clone, small checkpoints.

The checkpoints have Hugging Face's layout. `DENSE` is a T5 v1.1 pretrained on Python's standard
library, `DENSE_IMAGES` a Pix2Struct pretrained on printed letters, `DENSE_SPEECH` a speech encoder
with a CTC head pretrained on spoken digits. `CODA`, `CODA_IMAGES` and `CODA_SPEECH` are the same
after conditional pretraining, their adapters and routers in the folder `adapter`. The README.md of
each is a model card. They are not in the wheel: there, these names raise FileNotFoundError.
"""

import pathlib

_FOLDER = pathlib.Path(__file__).parent
_CHECKPOINTS = {
    "DENSE": "stdlib_t5",
    "CODA": "stdlib_t5_coda",
    "DENSE_IMAGES": "rendered_pix2struct",
    "CODA_IMAGES": "rendered_pix2struct_coda",
    "DENSE_SPEECH": "spoken_w2v_bert",
    "CODA_SPEECH": "spoken_w2v_bert_coda",
}

VOCABULARY = _FOLDER / "stdlib_vocabulary"


def checkpoint(folder: str) -> pathlib.Path:
    """The folder of a bundled checkpoint.

    Raises:
        FileNotFoundError: it is not there, as in an installed package.
    """
    path = _FOLDER / folder
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}: a clone of the repository has them, an installed "
            "package does not"
        )
    return path


def __getattr__(name: str) -> pathlib.Path:
    if name not in _CHECKPOINTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return checkpoint(_CHECKPOINTS[name])


def __dir__():
    return sorted({*globals(), *_CHECKPOINTS})
