"""Vocabularies of the library `tokenizers`: `tokenizer.json`, `vocab.json` with `merges.txt`.

Ids and texts are those of transformers' fast tokenizers. The library is imported when a vocabulary
is loaded.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import functools
import hashlib
import json
import re
import struct
from typing import Any

from absl import logging

from coda_jax import files
from coda_jax.data.vocabulary_files import (
    MERGES,
    NAMES,
    ROLES,
    SIDE_FILES,
    TOKENIZER,
    VOCAB,
    Folder,
    sentinel_ids,
)

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # in this order
_PROBE = "a \U0010fffd"  # with a character that no vocabulary has
# Steps of a decoder after which a token's text does not depend on the others.
_PIECEWISE = {"ByteLevel", "Metaspace", "ByteFallback", "Replace", "Fuse", "Strip"}
_MAX_GROWTH = 1000  # of a text by its normalisation; by NFKC of T5 at most 33


class TokenizersVocabulary:
    """A tokenizer of the library, with the tokens that were added to it.

    A text has the ids that transformers gives it, with what the tokenizer puts in front, but
    without EOS. A decoded text ends before the first EOS and has no padding and nothing of what
    the tokenizer puts in front; all other special tokens, such as sentinels, stay in it. Ids that
    the vocabulary does not have are decoded as the unknown token.

    Attributes:
        files: what to copy beside a checkpoint, {name: path}.
        fingerprint: the SHA-256 of tokenizer.json, or of what `load_bpe` reads.
    """

    def __init__(self, tokenizer: Any, folder: Folder, main: str, fingerprint: str):
        """Takes the library's tokenizer.

        Args:
            tokenizer: of the library.
            folder: whose settings say which tokens are special.
            main: name of the file that it was read from.
            fingerprint: of what was read.

        Raises:
            ValueError: no token ends a text, a text cannot be encoded, or the files beside the
                main one name tokens that it does not have; it puts more than EOS behind a text.
        """
        self.folder, self.fingerprint = folder, fingerprint
        own = {} if main in NAMES else {TOKENIZER: folder.file(main)}
        self.files = {**folder.present(*(SIDE_FILES if own else NAMES)), **own}
        self._file, self._tokenizer = folder.file(main), tokenizer
        ids = folder.special_ids(tokenizer.token_to_id)
        self.pad_id, self.eos_id, self.bos_id, self.unk_id = ids
        folder.check_added_tokens(tokenizer.token_to_id, main)
        tokenizer.no_padding()  # to a length that the file says
        tokenizer.no_truncation()
        with library_errors(self._file):
            _check_growth(tokenizer)
            plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
            ids = tokenizer.encode(_PROBE).ids
        self._adds_eos = ids[len(ids) - len(plain) - 1 :] == [*plain, self.eos_id]
        start = len(ids) - len(plain) - self._adds_eos  # how many it puts in front
        if ids[start : start + len(plain)] != plain:
            raise ValueError(
                f"{self._file!r} makes {plain} of a text, and with its special tokens {ids}: "
                f"behind a text may stand the end marker, {self.eos_id}, and nothing else"
            )
        if not self._adds_eos:
            logging.warning("%s adds no EOS to a text; it is added all the same", self._file)
        if self.eos_id in plain:
            logging.warning(
                "%s takes unknown characters for EOS, as transformers 5 writes a vocabulary whose "
                "unknown token is not the third: its spiece.model does not",
                self._file,
            )
        self._hidden = {self.pad_id, self.bos_id, *ids[:start]} - {self.unk_id}
        byte_pairs = type(tokenizer.model).__name__ == "BPE"  # which transformers does not clean up
        cleaned = folder.settings.get("clean_up_tokenization_spaces") is True
        self._cleans_up = cleaned and not byte_pairs

    @functools.cached_property
    def vocab_size(self) -> int:
        """The number of ids, with those of added tokens."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def sentinel_ids(self) -> list[int]:
        """The ids of the sentinels, the first one first."""
        return sentinel_ids(self.token_to_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token: int) -> str | None:
        """The text of an id as the vocabulary writes it, None where there is no such id."""
        return self._tokenizer.id_to_token(token)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without EOS."""
        with library_errors(self._file, f"cannot encode {text!r:.60}"):
            ids = self._tokenizer.encode(text).ids
        return ids[:-1] if self._adds_eos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS."""
        kept = []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            known = 0 <= i < self.vocab_size
            kept.append(i if known else self.unk_id)
        kept = [i for i in kept if i is not None and i not in self._hidden]
        with library_errors(self._file, f"cannot decode {kept!r:.60}"):
            text = self._tokenizer.decode(kept, skip_special_tokens=False)
        for written in _CLEANED if self._cleans_up else ():
            text = text.replace(written, written.strip())
        return text

    def pieces(self) -> list[bytes]:
        """Returns what each id adds to a text, in UTF-8; the first may lose a space there.

        Raises:
            ValueError: what it adds depends on where it stands, or is not known.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {"type": None}
        kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
        # Others, such as WordPiece, put spaces between tokens as they think fit.
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"} or kinds - _PIECEWISE:
            found = ", ".join(sorted(map(str, kinds)))
            raise ValueError(
                f"{self._file!r} joins tokens by {found}: stop texts need ByteLevel, Metaspace or "
                "ByteFallback"
            )
        by_bytes = _byte_level() if "ByteLevel" in kinds else None

        def piece(i):
            token = self.id_to_token(i)
            if token is None or i in (self.eos_id, *self._hidden):
                return b""
            if i in added:
                return token.encode()
            if by_bytes is not None:
                return bytes(by_bytes[char] for char in token if char in by_bytes)
            if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()

        return [piece(i) for i in range(self.vocab_size)]

    def __eq__(self, other):
        same = isinstance(other, TokenizersVocabulary)
        return same and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def _identity(self) -> tuple:
        return self.fingerprint, self.pad_id, self.eos_id, self.bos_id, self.unk_id

    def __deepcopy__(self, memo):
        return self  # nothing changes it; gin copies what it is given

    def __repr__(self):
        return f"TokenizersVocabulary({self._file!r})"


def _byte_level() -> dict[str, int]:
    """{character: byte} of byte-level BPE, which writes every byte as a character that is visible.

    Those of Latin-1 that are visible stand for themselves, the others get the next ones from 256.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {
        **{chr(byte): byte for byte in visible},
        **{chr(256 + number): byte for number, byte in enumerate(others)},
    }


def load_tokenizer_json(folder: Folder, name: str = TOKENIZER) -> TokenizersVocabulary:
    """Loads a tokenizer.json.

    Args:
        folder: of the file.
        name: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, or not a tokenizer.
    """
    from tokenizers import Tokenizer

    content = folder.read(name)
    with library_errors(folder.file(name)):
        tokenizer = Tokenizer.from_buffer(content)
    return TokenizersVocabulary(tokenizer, folder, name, hashlib.sha256(content).hexdigest())


def load_bpe(folder: Folder) -> TokenizersVocabulary:
    """Loads RoBERTa's byte-level BPE, as of CodeT5, from vocab.json and merges.txt.

    Its fingerprint is the SHA-256 of both files' and of the tokens that the others add.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is too large or damaged, or belongs to another kind of tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    kind = folder.tokenizer_class or "RobertaTokenizer"
    if not str(kind).startswith("Roberta"):
        raise ValueError(
            f"{folder.path!r} has {VOCAB} and {MERGES} of a {kind}, which are read of a "
            f"RobertaTokenizer only. Save it once more with transformers, which writes {TOKENIZER}"
        )
    vocab, merges = read_bpe(folder)
    spaced = folder.settings.get("add_prefix_space") is True
    with library_errors(folder.file(VOCAB)):
        model = models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        tokenizer.decoder = decoders.ByteLevel()
        added = _roberta_tokens(folder, vocab)
        tokenizer.add_tokens([_added_token(token) for token in added])
        names = [_name(folder, role) for role in ("sep", "cls")]
        ends = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=spaced)
    parts = [folder.sha256(VOCAB), folder.sha256(MERGES), spaced, added]
    listed = json.dumps(parts, sort_keys=True).encode()
    return TokenizersVocabulary(tokenizer, folder, VOCAB, hashlib.sha256(listed).hexdigest())


def read_bpe(folder: Folder) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces and the merges in vocab.json and merges.txt.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is too large or damaged.
    """
    vocab = files.parse_json(folder.read(VOCAB), folder.file(VOCAB))
    if not all(type(i) is int and 0 <= i < 2**31 for i in vocab.values()):
        raise ValueError(f"{folder.file(VOCAB)!r} must hold pieces and their ids")
    try:
        lines = folder.read(MERGES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder.file(MERGES)!r} is not a text: {error}") from error
    merges = [tuple(x.split(" ")) for x in lines if x.strip() and not x.startswith("#version")]
    if not all(len(pair) == 2 for pair in merges):
        raise ValueError(f"{folder.file(MERGES)!r} must hold two pieces a line")
    return dict(vocab), merges


def _name(folder: Folder, role: str) -> str:
    """The text of RoBERTa's token with a role."""
    token = folder.role_token(role)
    return token["content"] if token else ROLES[role]


def _roberta_tokens(folder: Folder, vocab: Mapping[str, int]) -> list[dict[str, Any]]:
    """The tokens that are never split, with their flags, in the order of their ids."""
    special = {name: {} for name in (_name(folder, role) for role in ROLES)}
    special |= folder.special_tokens()
    found = {}
    for text, fields in {**folder.added_tokens, **special}.items():
        fields = {**fields, **folder.added_tokens.get(text, {})}
        is_special = text in special or fields.get("special") is True
        flags = {"normalized": not is_special}
        flags |= {flag: fields[flag] is True for flag in _FLAGS if flag in fields}
        if text == ROLES["mask"] and "lstrip" not in flags:
            flags["lstrip"] = True
        order = fields.get("id", vocab.get(text, 2**31))
        found[text] = order, {"content": text, "special": is_special, **flags}
    return [token for _, token in sorted(found.values(), key=lambda x: x[0])]


def _added_token(token: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    return AddedToken(**token)


@contextlib.contextmanager
def library_errors(file: str, problem: str = "is not a tokenizer") -> Iterator[None]:
    """Turns what the library raises into a ValueError of one line that names the file.

    A panic of its Rust code is a BaseException, of no class that could be imported.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file!r} {problem}: {_one_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file!r} {problem}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _check_growth(tokenizer: Any) -> None:
    """Raises ValueError where a few letters could become more than the memory holds."""
    growth = 1
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is not None:
            growth *= _growth(json.loads(part.__getstate__()))
    if growth > _MAX_GROWTH:
        raise ValueError(f"its rules make a text up to {growth:,} times as long")


def _growth(part: Mapping[str, Any]) -> int:
    """How many times as long a normaliser or decoder can make a text."""
    if part["type"] == "Sequence":
        growth = 1
        for each in part.get("normalizers") or part.get("decoders") or ():
            growth = min(growth * _growth(each), 2**64)
        return growth
    if part["type"] == "Precompiled":
        return _longest_replacement(part["precompiled_charsmap"])
    return max(1, len(str(part.get("content") or part.get("prepend") or "").encode()))


def _longest_replacement(charsmap: str) -> int:
    """The bytes of the longest text that SentencePiece's rules put in the place of a character."""
    try:
        rules = base64.b64decode(charsmap)
        (trie,) = struct.unpack_from("<I", rules)
    except (binascii.Error, struct.error) as error:
        raise ValueError(f"its precompiled_charsmap is damaged: {error}") from error
    return max(map(len, rules[4 + trie :].split(b"\0")), default=1)
