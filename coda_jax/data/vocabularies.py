"""Vocabularies: texts to token ids and back, without seqio and TensorFlow.

The ids and texts are those of seqio's vocabularies of the same names. `seqio_vocabulary` in
`seqio_tasks` makes seqio's own, which its tasks need.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import hashlib
import os
import struct
from typing import ClassVar, Protocol

import sentencepiece

VOCABULARY_NAME = "spiece.model"  # in a checkpoint's folder, as Hugging Face names it
EXTRA_IDS = 100  # of T5: sentinels, after the ids of the file
BYTE_EXTRA_IDS = 125  # of ByT5, which has 384 ids together

_SENTINEL = "▁<extra_id_{}>"
_USER_DEFINED = 4  # the type of a piece that is never split
_PAD, _EOS, _UNKNOWN = 0, 1, 2
_FIRST_BYTE, _NUM_BYTES = 3, 256


class Vocabulary(Protocol):
    """What a vocabulary offers.

    Attributes:
        vocab_size: the number of ids, with the extra ids.
        eos_id: of the token that ends a text.
        pad_id: of what fills up a row.
        fingerprint: the SHA-256 of the file, or "bytes".
        file: the SentencePiece file; None for bytes.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    fingerprint: str
    file: str | None

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
class SentencePieceVocabulary:
    """A SentencePiece model with T5's extra ids behind its own, the first of them last.

    A file that has pieces for the extra ids, as mT5's, gets no more. Ids that the vocabulary does
    not have are decoded as the unknown token.

    Attributes:
        file: a SentencePiece model.
    """

    file: str

    pad_id: ClassVar[int] = _PAD

    @functools.cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The tokeniser.

        Raises:
            FileNotFoundError: there is no such file.
            RuntimeError: it is not a SentencePiece model.
        """
        with open(self.file, "rb") as f:
            model = f.read()
        processor = _load(model)
        if processor.piece_to_id(_SENTINEL.format(0)) != processor.unk_id():
            return processor
        # Pieces are a repeated field of the message, so that bytes behind it are more of them.
        model += b"".join(_serialised_piece(_SENTINEL.format(i)) for i in range(EXTRA_IDS)[::-1])
        return _load(model)

    @property
    def vocab_size(self) -> int:
        """The number of ids, with the extra ids."""
        return self.processor.vocab_size()

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text."""
        return self.processor.eos_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the file."""
        return _sha256(self.file)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        return self.processor.EncodeAsIds(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS."""
        unknown, size = self.processor.unk_id(), self.vocab_size
        ids = [int(i) if i < size else unknown for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        return self.processor.DecodeIds(ids)

    def pieces(self) -> list[bytes]:
        """Returns what each id adds to a text, in UTF-8; the first may lose a space there."""
        p = self.processor

        def piece(i):
            if p.is_byte(i):
                return bytes([int(p.id_to_piece(i)[3:5], 16)])  # written as <0x41>
            return b"" if p.is_control(i) else p.id_to_piece(i).replace("▁", " ").encode()

        found = [piece(i) for i in range(self.vocab_size)]
        found[p.unk_id()] = p.decode([p.unk_id()]).encode()
        return found


def _load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _serialised_piece(piece: str) -> bytes:
    """A user-defined piece of score 0 as a field of SentencePiece's ModelProto message."""
    text = piece.encode()
    # Fields 1, 2 and 3: the text, the score and the type.
    message = b"\x0a" + bytes([len(text)]) + text
    message += b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([_USER_DEFINED])
    return b"\x0a" + bytes([len(message)]) + message  # field 1: a piece


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """ByT5's vocabulary: 0 is padding, 1 EOS, 2 unknown, then the bytes of UTF-8 and extra ids.

    What is no byte, or no UTF-8, is missing in a decoded text.
    """

    vocab_size: ClassVar[int] = _FIRST_BYTE + _NUM_BYTES + BYTE_EXTRA_IDS
    pad_id: ClassVar[int] = _PAD
    eos_id: ClassVar[int] = _EOS
    fingerprint: ClassVar[str] = "bytes"
    file: ClassVar[None] = None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        return [byte + _FIRST_BYTE for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS."""
        ids = list(ids)
        if _EOS in ids:
            ids = ids[: ids.index(_EOS)]
        found = bytes(int(i) - _FIRST_BYTE for i in ids if 0 <= i - _FIRST_BYTE < _NUM_BYTES)
        return found.decode(errors="ignore")

    def pieces(self) -> list[bytes]:
        """Returns what each id adds to a text, in UTF-8."""
        every = range(self.vocab_size)
        is_byte = range(_FIRST_BYTE, _FIRST_BYTE + _NUM_BYTES)
        return [bytes([i - _FIRST_BYTE]) if i in is_byte else b"" for i in every]


def load_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """Loads a vocabulary.

    Args:
        path: a checkpoint's directory that holds `spiece.model`, such a file, or "bytes".

    Returns:
        A SentencePiece vocabulary with T5's 100 extra ids, or ByT5's bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a SentencePiece model.
    """
    if os.fspath(path) == "bytes":
        return ByteVocabulary()
    vocabulary = SentencePieceVocabulary(find_file(path))
    try:
        _ = vocabulary.processor  # which reads the file
    except RuntimeError as e:
        raise ValueError(f"{vocabulary.file!r} is not a SentencePiece model: {e}") from e
    return vocabulary


def find_file(
    path: str | os.PathLike,
    isdir: Callable[[str], bool] = os.path.isdir,
    exists: Callable[[str], bool] = os.path.exists,
) -> str:
    """Returns the vocabulary's file.

    Args:
        path: a checkpoint's directory that holds `spiece.model`, or such a file.
        isdir: as `os.path.isdir`.
        exists: as `os.path.exists`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = os.fspath(path)
    file = os.path.join(path, VOCABULARY_NAME) if isdir(path) else path
    if not exists(file):
        raise FileNotFoundError(f'No vocabulary {file!r}. For a model of bytes (ByT5) say "bytes"')
    return file


def check_vocabulary(
    fingerprint: str,
    num_ids: int,
    vocab_size: int,
    checkpoint_directory: str | os.PathLike | None = None,
) -> None:
    """Checks that the ids of a vocabulary are those that a model was trained with.

    Args:
        fingerprint: the SHA-256 of the vocabulary's file, or "bytes".
        num_ids: how many ids it has.
        vocab_size: the model's number of embeddings; more than the vocabulary has is fine.
        checkpoint_directory: where the model's `spiece.model` may lie.

    Raises:
        ValueError: the vocabulary has more ids than the model, or differs from the checkpoint's.
    """
    if num_ids > vocab_size:
        raise ValueError(f"The vocabulary has {num_ids} ids, the model only {vocab_size}")
    theirs = None if checkpoint_directory is None else find_fingerprint(checkpoint_directory)
    if theirs is not None and fingerprint != theirs:
        file = os.path.join(checkpoint_directory, VOCABULARY_NAME)
        raise ValueError(
            f"The vocabulary of the data differs from the checkpoint's {file!r} "
            f"(SHA-256 {fingerprint}, {theirs})"
        )


def find_fingerprint(directory: str | os.PathLike) -> str | None:
    """Returns the SHA-256 of a directory's `spiece.model`, None where there is no such file."""
    file = os.path.join(directory, VOCABULARY_NAME)
    return _sha256(file) if os.path.isfile(file) else None


def _sha256(file: str) -> str:
    with open(file, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()
