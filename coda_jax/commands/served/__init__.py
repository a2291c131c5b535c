"""What `coda export` puts beside its programs: modules that are copied, and run without coda_jax.

| file | is copied as |
|---|---|
| `load` | load.py |
| `byte_vocabulary` | vocabulary.py, for bytes |
| `sentencepiece_vocabulary` | vocabulary.py, for a spiece.model |
| `tokenizers_vocabulary` | vocabulary.py, for a tokenizer.json |

The `served` of a family's inputs is copied as inputs.py.
"""

import pathlib
import shutil
from typing import Any

from coda_jax.data.reports import say
from coda_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from coda_jax.data.tokenizers_vocabulary import TokenizersVocabulary
from coda_jax.data.vocabularies import ByteVocabulary, Vocabulary
from coda_jax.data.vocabulary_files import SPIECE, TOKENIZER

_FOLDER = pathlib.Path(__file__).parent


def write_loader(
    directory: pathlib.Path, inputs: pathlib.Path, vocabulary: Vocabulary | None
) -> dict[str, Any] | None:
    """Writes the modules, and the file of a vocabulary as they read it.

    Args:
        directory: where.
        inputs: the module that reads inputs.
        vocabulary: of texts; None where there is none.

    Returns:
        What the manifest says of the vocabulary; None where nothing is written, which is said.
    """
    if isinstance(vocabulary, SentencePieceVocabulary):
        kind, said = "sentencepiece", {"file": SPIECE}
        (directory / SPIECE).write_bytes(vocabulary.processor.serialized_model_proto())
    elif isinstance(vocabulary, TokenizersVocabulary) and TOKENIZER in vocabulary.files:
        kind, said = "tokenizers", {"file": TOKENIZER, **_of_tokenizer(vocabulary)}
        shutil.copy(vocabulary.files[TOKENIZER], directory / TOKENIZER)
    elif isinstance(vocabulary, ByteVocabulary):
        kind, said = "byte", {}
    else:
        found = ", ".join(vocabulary.files) if vocabulary else "no vocabulary"
        say(
            f"there is no load.py in the folder, as there is {found}: --gin.VOCABULARY names a "
            f"{SPIECE}, a {TOKENIZER}, which transformers writes, or bytes"
        )
        return None
    shutil.copy(_FOLDER / "load.py", directory)
    shutil.copy(_FOLDER / f"{kind}_vocabulary.py", directory / "vocabulary.py")
    shutil.copy(inputs, directory / "inputs.py")
    return {"eos_id": vocabulary.eos_id, **said}


def _of_tokenizer(vocabulary: TokenizersVocabulary) -> dict[str, Any]:
    """What the files beside a tokenizer.json say, and coda_jax reads in them."""
    hidden = {vocabulary.pad_id, vocabulary.bos_id, *vocabulary.encode("")} - {None}
    return {
        "size": vocabulary.vocab_size,
        "unk_id": vocabulary.unk_id,
        "hidden": sorted(hidden - {vocabulary.unk_id}),
        "cleans_up": vocabulary.folder.settings.get("clean_up_tokenization_spaces") is True,
    }
