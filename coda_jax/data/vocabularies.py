"""Vocabularies: texts to token ids and back, without seqio and TensorFlow.

`load_vocabulary` finds the kind of a folder's vocabulary. `seqio_vocabulary` in `seqio_tasks` makes
the same for seqio's tasks. Those of SentencePiece and of bytes have seqio's ids and texts, those of
the library `tokenizers` transformers'. All of them decode up to the first EOS, without padding.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import os
import pathlib
import shutil
from typing import ClassVar, Protocol

from coda_jax import hub
from coda_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from coda_jax.data.tokenizers_vocabulary import load_bpe, load_tokenizer_json
from coda_jax.data.vocabulary_agreement import check_bpe, check_spiece
from coda_jax.data.vocabulary_files import (
    LOCAL,
    MERGES,
    NAMES,
    SENTINEL,
    SPIECE,
    TOKENIZER,
    VOCAB,
    FileSystem,
    Folder,
)

_KINDS = ((SPIECE,), (TOKENIZER,), (VOCAB, MERGES))  # each by its files
BYTE_EXTRA_IDS = 125  # of ByT5, which has 384 ids together
BYTE_SENTINELS = 100  # of ByT5's span corruption
_FIRST_BYTE, _NUM_BYTES = 3, 256
_BYTES = "ByT5Tokenizer"
_SAY_BYTES = 'For a model of bytes give VOCABULARY=bytes, in Python "bytes"'


class Vocabulary(Protocol):
    """What a vocabulary offers.

    Attributes:
        vocab_size: the number of ids, with the extra ids.
        eos_id: of the token that ends a text.
        pad_id: of what fills up a row; None where no file says one.
        unk_id: of what it has no pieces for; None where there is no such thing.
        sentinel_ids: of the sentinels of span corruption, the first one first.
        fingerprint: the SHA-256 of what says the ids, or "bytes".
        files: what to copy beside a checkpoint, {name: path}; none for bytes.
    """

    vocab_size: int
    eos_id: int
    pad_id: int | None
    unk_id: int | None
    sentinel_ids: list[int]
    fingerprint: str
    files: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS."""
        ...

    def pieces(self) -> list[bytes]:
        """Returns what each id adds to a text, in UTF-8; the first may lose a space there."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """ByT5's vocabulary: 0 is padding, 1 EOS, 2 unknown, then the bytes of UTF-8 and extra ids.

    What is no byte, or no UTF-8, is missing in a decoded text.

    Attributes:
        extra_ids: how many there are.
    """

    extra_ids: int = BYTE_EXTRA_IDS

    pad_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    unk_id: ClassVar[None] = None
    fingerprint: ClassVar[str] = "bytes"
    files: ClassVar[Mapping[str, str]] = {}

    @property
    def vocab_size(self) -> int:
        """The number of ids, with the extra ids."""
        return _FIRST_BYTE + _NUM_BYTES + self.extra_ids

    @property
    def sentinel_ids(self) -> list[int]:
        """The last bytes in descending order, 258, 257, ...: ByT5 never saw the extra ids.

        Texts have such bytes too, unless they are ASCII, as in ByT5's own pretraining.
        """
        end = _FIRST_BYTE + _NUM_BYTES
        return list(range(end - 1, end - 1 - BYTE_SENTINELS, -1))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        return [byte + _FIRST_BYTE for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        found = bytes(int(i) - _FIRST_BYTE for i in ids if 0 <= i - _FIRST_BYTE < _NUM_BYTES)
        return found.decode(errors="ignore")

    def pieces(self) -> list[bytes]:
        """Returns what each id adds to a text, in UTF-8."""
        every = range(self.vocab_size)
        is_byte = range(_FIRST_BYTE, _FIRST_BYTE + _NUM_BYTES)
        return [bytes([i - _FIRST_BYTE]) if i in is_byte else b"" for i in every]


def load_vocabulary(path: str | os.PathLike, system: FileSystem = LOCAL) -> Vocabulary:
    """Loads a vocabulary.

    A folder with several kinds must have `tokenizer.json` among them, with which the others must
    agree. `spiece.model` takes precedence unless `tokenizer.json` has tokens that were added later.

    Args:
        path: a checkpoint's directory that holds `spiece.model`, `tokenizer.json`, `vocab.json`
            with `merges.txt`, or ByT5's `tokenizer_config.json`; the name of a model in the cache
            of the Hugging Face Hub; such a file; or "bytes".
        system: what reads the files.

    Returns:
        The vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or too large; the kinds differ (the first difference is named);
            or other files name tokens that it does not have.
    """
    path = os.fspath(path)
    if path == "bytes":
        return ByteVocabulary()
    path = os.fspath(hub.snapshot(path) or path)
    if system.isdir(path):
        return _load_folder(Folder(path, system))
    if not system.exists(path):
        whole = f"; the Hub's name is whole, such as 'google/{path}'" if "/" not in path else ""
        raise FileNotFoundError(
            f"No vocabulary {path!r}: there is no such file or folder{whole}. {_SAY_BYTES}"
        )
    folder, name = Folder(os.path.dirname(path), system), os.path.basename(path)
    if name in (VOCAB, MERGES):
        return load_bpe(folder)
    if name.endswith(".json"):
        return load_tokenizer_json(folder, name)
    return _load_spiece(SentencePieceVocabulary(path, folder.extra_ids(), system))


def _load_folder(folder: Folder) -> Vocabulary:
    has_spiece, has_bpe = folder.has(SPIECE), folder.has(VOCAB, MERGES)
    if folder.has(TOKENIZER):
        tokenizer = load_tokenizer_json(folder)
        if has_bpe:
            check_bpe(folder)
        if not has_spiece:
            return tokenizer
        extra_ids = len(tokenizer.sentinel_ids)
        spiece = SentencePieceVocabulary(folder.file(SPIECE), extra_ids, folder.system)
        check_spiece(spiece, tokenizer)
        return tokenizer if tokenizer.vocab_size > spiece.vocab_size else spiece
    if has_spiece and has_bpe:
        raise ValueError(f"{folder.path!r} has two vocabularies, {SPIECE} and {VOCAB}: remove one")
    if has_bpe:
        return load_bpe(folder)
    if has_spiece:
        file = folder.file(SPIECE)
        return _load_spiece(SentencePieceVocabulary(file, folder.extra_ids(), folder.system))
    if folder.tokenizer_class == _BYTES:
        return _load_bytes(folder)
    kinds = ", ".join(" with ".join(kind) for kind in _KINDS)
    raise FileNotFoundError(f"No vocabulary in {folder.path!r}: none of {kinds}. {_SAY_BYTES}")


def _load_spiece(vocabulary: SentencePieceVocabulary) -> SentencePieceVocabulary:
    sentinels = {SENTINEL.format(i): found for i, found in enumerate(vocabulary.sentinel_ids)}
    vocabulary.folder.check_added_tokens(
        lambda token: sentinels.get(token, vocabulary.token_to_id(token)),
        os.path.basename(vocabulary.file),
    )
    return vocabulary


def _load_bytes(folder: Folder) -> ByteVocabulary:
    vocabulary = ByteVocabulary()
    more = [t for t, x in folder.added_tokens.items() if x["id"] >= vocabulary.vocab_size]
    if more:
        raise ValueError(f"{folder.path!r} adds tokens to ByT5's, such as {more[0]!r}")
    return vocabulary


@dataclasses.dataclass(frozen=True)
class Identity:
    """The parts of a vocabulary that a model must match.

    Attributes:
        fingerprint: the vocabulary's.
        vocab_size: how many ids it has.
        eos_id: of the token that ends a text; None where it is not known.
        pad_id: of what fills up a row; None where it is not known.
    """

    fingerprint: str
    vocab_size: int
    eos_id: int | None = None
    pad_id: int | None = None


def identity(vocabulary: Vocabulary) -> Identity:
    """The parts of a vocabulary that a model must match."""
    return Identity(*(getattr(vocabulary, field.name) for field in dataclasses.fields(Identity)))


def check_vocabulary(
    found: Identity,
    vocab_size: int,
    directory: str | os.PathLike | None = None,
    *,
    eos_id: int | None = None,
    pad_id: int | None = None,
    adapter: Mapping[str, str] | None = None,
) -> None:
    """Checks that the ids of a vocabulary are those that a model was trained with.

    Args:
        found: of the vocabulary.
        vocab_size: the model's number of embeddings; more than the vocabulary has is fine.
        directory: where the model's own vocabulary may lie.
        eos_id: the model's token that ends a text, if it is known.
        pad_id: the model's token that fills up a row, if it is known.
        adapter: {its folder: the fingerprint of the vocabulary that it was trained with}.

    Raises:
        ValueError: the vocabulary has more ids than the model, another end or padding, or differs
            from the checkpoint's or the adapter's.
    """
    if found.vocab_size > vocab_size:
        raise ValueError(f"The vocabulary has {found.vocab_size} ids, the model only {vocab_size}")
    for name, ours, theirs in (("eos_id", found.eos_id, eos_id), ("pad_id", found.pad_id, pad_id)):
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"The vocabulary has {name}={ours}, the model {name}={theirs}")
    theirs = None if directory is None else find_fingerprint(directory)
    if theirs is not None and found.fingerprint != theirs:
        raise ValueError(
            f"The vocabulary of the data differs from that of {os.fspath(directory)!r} "
            f"(SHA-256 {found.fingerprint}, {theirs})"
        )
    for path, trained in (adapter or {}).items():
        if found.fingerprint != trained:
            raise ValueError(
                f"{path} was trained with another vocabulary than the one that is used "
                f"(SHA-256 {trained}, {found.fingerprint})"
            )


def find_files(directory: str | os.PathLike) -> dict[str, str]:
    """The files of a directory's vocabulary, {name: path}; {} where there is none."""
    folder = Folder(os.fspath(directory))
    found = any(folder.has(*kind) for kind in _KINDS) or folder.tokenizer_class == _BYTES
    return folder.present(*NAMES) if found else {}


def find_fingerprint(directory: str | os.PathLike) -> str | None:
    """The fingerprint of a directory's vocabulary, None where there is none.

    Raises:
        ValueError: `load_vocabulary` refuses it; where `spiece.model` or `tokenizer.json` is the
            only kind, it is not loaded.
    """
    folder, found = Folder(os.fspath(directory)), find_files(directory)
    if not found and folder.tokenizer_class != _BYTES:
        return None
    kinds = [kind for kind in _KINDS if folder.has(*kind)]
    if kinds in ([(SPIECE,)], [(TOKENIZER,)]):  # the usual case, without loading it
        return folder.sha256(*kinds[0])
    return load_vocabulary(directory).fingerprint


def copy_files(files: Mapping[str, str], directory: str | os.PathLike) -> None:
    """Copies the files of a vocabulary, {name: path}, beside a checkpoint."""
    for name, path in files.items():
        target = pathlib.Path(directory) / name
        if pathlib.Path(path).resolve() != target.resolve():
            shutil.copy(path, target)
