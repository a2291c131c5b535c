"""seqio's vocabularies: those of seqio, or over the library `tokenizers`."""

import functools
import os

import numpy as np

from coda_jax.data.sentencepiece_vocabulary import SPACE_BETWEEN, SentencePieceVocabulary
from coda_jax.data.tokenizers_vocabulary import TokenizersVocabulary
from coda_jax.data.vocabularies import ByteVocabulary, Vocabulary, load_vocabulary
from coda_jax.data.vocabulary_files import FileSystem
from coda_jax.optional import needs

with needs():
    import seqio
    import tensorflow as tf


class TokenizersSeqioVocabulary(seqio.Vocabulary):
    """A vocabulary of the library `tokenizers` for seqio: the same ids and texts.

    seqio and T5X fill up rows with 0, whatever its padding is.

    Attributes:
        plain: the vocabulary.
    """

    def __init__(self, plain: TokenizersVocabulary):
        super().__init__()  # its sentinels are ids like others
        self.plain = plain

    @property
    def bos_id(self) -> int | None:
        return self.plain.bos_id

    @property
    def eos_id(self) -> int:
        return self.plain.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.plain.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.plain.vocab_size

    def _encode(self, s: str | bytes) -> list[int]:
        return self.plain.encode(s.decode() if isinstance(s, bytes) else s)

    def _decode(self, ids) -> str:
        return self.plain.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text):
            return np.array(self._encode(text), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(ids):
            rows = ids.reshape(-1, ids.shape[-1]).tolist()
            texts = np.array([self.plain.decode(row).encode() for row in rows], object)
            return texts.reshape(ids.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.ensure_shape(texts, ids.shape[:-1])

    def __eq__(self, other):
        return isinstance(other, TokenizersSeqioVocabulary) and self.plain == other.plain

    def __hash__(self):
        return hash(self.plain)

    def __str__(self):
        return str(self.plain)


class SentencePieceSeqioVocabulary(seqio.SentencePieceVocabulary):
    """seqio's, with sentinels wherever they stand: see `sentencepiece_vocabulary`.

    seqio compares vocabularies by their attributes, so that this one has no others.
    """

    @property
    def _same(self) -> SentencePieceVocabulary:
        return _plain_once(self.sentencepiece_model_file, self.extra_ids)

    def _encode(self, s: str | bytes) -> list[int]:
        return self._same.encode(s.decode() if isinstance(s, bytes) else s)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        glued = self._same.glued_sentinel
        for _ in range(2):
            s = tf.strings.regex_replace(s, glued, SPACE_BETWEEN)
        return super()._encode_tf(s)


_BUCKETS = FileSystem(
    isdir=tf.io.gfile.isdir,
    exists=tf.io.gfile.exists,
    size=lambda path: tf.io.gfile.stat(path).length,
    open=lambda path: tf.io.gfile.GFile(path, "rb"),
)


def seqio_vocabulary(path: str | os.PathLike) -> seqio.Vocabulary:
    """Loads a vocabulary for seqio, also from a bucket; see `vocabularies.load_vocabulary`.

    Args:
        path: as `load_vocabulary` takes it.

    Returns:
        seqio's vocabulary of SentencePiece or bytes, or one over the library `tokenizers`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for `load_vocabulary`.
    """
    plain = load_vocabulary(path, _BUCKETS)
    if isinstance(plain, TokenizersVocabulary):
        return TokenizersSeqioVocabulary(plain)
    if isinstance(plain, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=plain.extra_ids)
    return SentencePieceSeqioVocabulary(plain.file, extra_ids=plain.added_ids)


def plain_vocabulary(vocabulary: seqio.Vocabulary) -> Vocabulary:
    """The vocabulary without seqio that has the same ids."""
    if isinstance(vocabulary, TokenizersSeqioVocabulary):
        return vocabulary.plain
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(vocabulary.extra_ids)
    return _plain(vocabulary.sentencepiece_model_file, vocabulary.extra_ids)


def _plain(file: str, extra_ids: int) -> SentencePieceVocabulary:
    return SentencePieceVocabulary(file, extra_ids, _BUCKETS)


_plain_once = functools.lru_cache(maxsize=8)(_plain)  # seqio remembers a file's, too
