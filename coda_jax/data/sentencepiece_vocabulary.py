"""The vocabulary of a SentencePiece file, `spiece.model`. Ids and texts are those of seqio's.

A sentinel is one wherever it stands. seqio's, whose pieces begin with a space, are letters behind
any other character, as in `f(<extra_id_0>)`: one without the space gets it here, as it is decoded.

Of two ways to divide a text with equal scores, such as 0 00 and 00 0, rounding picks one: the sum
of the scores before a piece is float32, that with the piece float64, and it must be the larger one.
So do SentencePiece up to 0.2.1 and tensorflow-text, with which seqio and T5X divide texts. From
0.2.2 on the second sum is float32 too, and the library `tokenizers` has float64 alone.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import os
import re
import struct

import sentencepiece

from coda_jax.data.sentencepiece_file import check_model
from coda_jax.data.vocabulary_files import (
    EXTRA_IDS,
    LOCAL,
    NAMES,
    SENTINEL,
    SIDE_FILES,
    SPACED_SENTINEL,
    SPIECE,
    FileSystem,
    Folder,
    SpecialIds,
    sentinel_ids,
)

SPACE_BETWEEN = r"\1 \2"  # what a `glued_sentinel` becomes
_SENTINEL_START = SENTINEL.partition("{")[0]
_USER_DEFINED = 4  # the type of a piece that is never split


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model with T5's extra ids behind its own, the first of them last.

    A file that has pieces for the extra ids, as mT5's, gets no more. Ids that the vocabulary does
    not have are decoded as the unknown token.

    Attributes:
        file: a SentencePiece model.
        extra_ids: how many the file gets, if it has none.
        system: what reads the file.
    """

    file: str
    extra_ids: int = EXTRA_IDS
    system: FileSystem = dataclasses.field(default=LOCAL, repr=False, compare=False)

    @functools.cached_property
    def _loaded(self) -> tuple[sentencepiece.SentencePieceProcessor, int]:
        """The tokeniser, and how many extra ids it got."""
        model = self.folder.read(os.path.basename(self.file))
        try:
            check_model(model)
            processor = _load(model)
            processor.id_to_piece([*range(processor.get_piece_size())])  # all are UTF-8
        except (RuntimeError, ValueError) as e:
            raise ValueError(f"{self.file!r} is not a SentencePiece model: {e}") from e
        if sentinel_ids(functools.partial(_piece_id, processor)):
            return processor, 0
        # Pieces are a repeated field of the message, so that bytes behind it are more of them.
        sentinels = (SPACED_SENTINEL.format(i) for i in range(self.extra_ids)[::-1])
        return _load(model + b"".join(map(_serialised_piece, sentinels))), self.extra_ids

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """The tokeniser.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a SentencePiece model.
        """
        return self._loaded[0]

    @property
    def added_ids(self) -> int:
        """How many extra ids are not the file's own."""
        return self._loaded[1]

    @property
    def folder(self) -> Folder:
        """The folder of the file."""
        return Folder(os.path.dirname(self.file), self.system)

    @property
    def files(self) -> Mapping[str, str]:
        """What to copy beside a checkpoint, {name: path}."""
        renamed = os.path.basename(self.file) != SPIECE  # what lies beside it may be another's
        found = self.folder.present(*(SIDE_FILES if renamed else NAMES))
        return {**found, SPIECE: self.file}

    @property
    def vocab_size(self) -> int:
        """The number of ids, with the extra ids."""
        return self.processor.vocab_size()

    @functools.cached_property
    def _special_ids(self) -> SpecialIds:
        said = {role: getattr(self.processor, f"{role}_id")() for role in SpecialIds._fields}
        return self.folder.special_ids(self.token_to_id, said)

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a text."""
        return self._special_ids.eos

    @property
    def pad_id(self) -> int | None:
        """The id of the token that fills up a row, None where no file says one."""
        return self._special_ids.pad

    @property
    def unk_id(self) -> int:
        """The id of what it has no pieces for."""
        return self.processor.unk_id()

    @functools.cached_property
    def sentinel_ids(self) -> list[int]:
        """The ids of the sentinels, the first one first."""
        return sentinel_ids(self.token_to_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the file."""
        return self.folder.sha256(os.path.basename(self.file))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is no such token."""
        return _piece_id(self.processor, token)

    @functools.cached_property
    def glued_sentinel(self) -> str:
        """A regular expression, also of TensorFlow: a character, and a sentinel that needs a space.

        Two of them may share a sentinel, so that all are found in two passes.
        """
        every = map(SENTINEL.format, range(len(self.sentinel_ids)))
        spaced = [text for text in every if self.token_to_id(text) is None]
        return f"([^ ▁])({'|'.join(spaced) or SENTINEL})"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        if _SENTINEL_START in text:
            for _ in range(2):
                text = re.sub(self.glued_sentinel, SPACE_BETWEEN, text)
        return self.processor.EncodeAsIds(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS."""
        unknown, size = self.processor.unk_id(), self.vocab_size
        ids = [int(i) if 0 <= i < size else unknown for i in ids]
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


def _piece_id(processor: sentencepiece.SentencePieceProcessor, token: str) -> int | None:
    """The id of a piece, None where there is no such piece."""
    found = processor.piece_to_id(token)
    is_unknown = found == processor.unk_id() and processor.id_to_piece(found) != token
    return None if is_unknown else found


def _serialised_piece(piece: str) -> bytes:
    """A user-defined piece of score 0 as a field of SentencePiece's ModelProto message."""
    text = piece.encode()
    # Fields 1, 2 and 3: the text, the score and the type.
    message = b"\x0a" + bytes([len(text)]) + text
    message += b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([_USER_DEFINED])
    return b"\x0a" + bytes([len(message)]) + message  # field 1: a piece
