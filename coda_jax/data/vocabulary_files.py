"""The files of a vocabulary in a checkpoint's folder, and what they say of its special tokens.

The one place that knows these files by name and the special tokens by role.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import os
import re
from typing import Any, BinaryIO, NamedTuple

from coda_jax import files

SPIECE = "spiece.model"
TOKENIZER = "tokenizer.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
SETTINGS, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
MODEL_CONFIG = "config.json"
SIDE_FILES = (SETTINGS, SPECIAL_TOKENS, ADDED_TOKENS)
NAMES = (SPIECE, TOKENIZER, VOCAB, MERGES, *SIDE_FILES)
MAX_BYTES = 64 * 2**20  # of a vocabulary; the largest that are published have 35 MB
MAX_SIDE_BYTES = 4 * 2**20  # of the files beside it

EXTRA_IDS = 100  # of T5: sentinels, after the ids of the file
SENTINEL = "<extra_id_{}>"
SPACED_SENTINEL = "▁" + SENTINEL  # as a piece, with the space before it

ROLES = {  # the tokens as transformers calls them where no file does
    "pad": "<pad>",
    "eos": "</s>",
    "bos": "<s>",
    "unk": "<unk>",
    "sep": "</s>",
    "cls": "<s>",
    "mask": "<mask>",
}
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class FileSystem(NamedTuple):
    """How files are read: local ones, or those of buckets too.

    Attributes:
        isdir: as `os.path.isdir`.
        exists: as `os.path.isfile`, as a pipe would keep whoever opens it waiting.
        size: as `os.path.getsize`.
        open: opens a file for reading of bytes.
    """

    isdir: Callable[[str], bool]
    exists: Callable[[str], bool]
    size: Callable[[str], int]
    open: Callable[[str], BinaryIO]


def _open(path: str) -> BinaryIO:
    return open(path, "rb")


LOCAL = FileSystem(os.path.isdir, os.path.isfile, os.path.getsize, _open)


class SpecialIds(NamedTuple):
    """The ids of the tokens with a role; None for a role that no token has."""

    pad: int | None
    eos: int
    bos: int | None
    unk: int | None


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder of a vocabulary.

    Attributes:
        path: of the folder; "" for the current one.
        system: what reads it.
    """

    path: str
    system: FileSystem = dataclasses.field(default=LOCAL, repr=False)

    def file(self, name: str) -> str:
        """The path of a file."""
        return os.path.join(self.path, name)

    def has(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all(self.system.exists(self.file(name)) for name in names)

    def present(self, *names: str) -> dict[str, str]:
        """Those of the files that are there: {name: path}."""
        return {name: self.file(name) for name in names if self.has(name)}

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is larger than such a file can be.
        """
        file = self.file(name)
        if not self.system.exists(file):
            raise FileNotFoundError(f"No vocabulary {file!r}")
        most = MAX_SIDE_BYTES if name in (*SIDE_FILES, MODEL_CONFIG) else MAX_BYTES
        size = self.system.size(file)
        if size > most:
            raise ValueError(f"{file!r} has {size:,} bytes; such a file has at most {most:,}")
        with self.system.open(file) as f:
            return f.read()

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file; raises as `read` does."""
        return hashlib.sha256(self.read(name)).hexdigest()

    def json(self, name: str) -> Mapping[str, Any]:
        """The object in a JSON file, {} where there is none.

        Raises:
            ValueError: it is not JSON, or not an object; the file is named.
        """
        return files.parse_json(self.read(name), self.file(name)) if self.has(name) else {}

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """What tokenizer_config.json and special_tokens_map.json say.

        As in transformers, the second takes precedence unless the first describes all added tokens.
        """
        settings, tokens = self.json(SETTINGS), self.json(SPECIAL_TOKENS)
        newer = "added_tokens_decoder" in settings
        return {**tokens, **settings} if newer else {**settings, **tokens}

    @functools.cached_property
    def tokenizer_class(self) -> str | None:
        """What transformers reads the vocabulary with, if a file says it."""
        name = "tokenizer_class"
        return self.settings.get(name) or self.json(MODEL_CONFIG).get(name)

    @functools.cached_property
    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """The tokens that the files beside the vocabulary name, as {text: its fields and "id"}.

        Raises:
            ValueError: a file does not have the form that transformers writes.
        """
        if (decoder := self.settings.get("added_tokens_decoder")) is not None:
            _check(isinstance(decoder, dict), self.file(SETTINGS), "added_tokens_decoder", decoder)
            tokens = [(key, self._token(value)) for key, value in decoder.items()]
        else:
            added = self.json(ADDED_TOKENS)
            tokens = [(key, {"content": text}) for text, key in added.items()]
        for key, _ in tokens:
            _check(re.fullmatch(r"\d{1,9}", str(key)), self.path, "id of an added token", key)
        return {token["content"]: {**token, "id": int(key)} for key, token in tokens}

    def role_token(self, role: str) -> dict[str, Any] | None:
        """The fields of the token that the settings give a role, at least its "content"."""
        value = self.settings.get(f"{role}_token")
        return None if value is None else self._token(value)

    def special_tokens(self) -> dict[str, dict[str, Any]]:
        """The tokens that the settings call special, by text: their fields."""
        tokens = [token for role in ROLES if (token := self.role_token(role)) is not None]
        for key in _LISTS:
            value = self.settings.get(key) or []
            if isinstance(value, dict):  # by the names that transformers 4 calls them
                value = [*value.values()]
            _check(isinstance(value, list), self.file(SETTINGS), key, value)
            tokens += map(self._token, value)
        return {token["content"]: token for token in tokens}

    def special_ids(
        self, token_to_id: Callable[[str], int | None], known: Mapping[str, int] | None = None
    ) -> SpecialIds:
        """The ids of the roles: as the vocabulary's own file, its settings, or config.json say.

        Padding that is the end marker too counts as none: it could not be told from a token.

        Args:
            token_to_id: a token's id in the vocabulary, None for one that it does not have.
            known: ids that the vocabulary's own file says, by role; negative for none.

        Raises:
            ValueError: none of them says which token ends a text.
        """
        model = self.json(MODEL_CONFIG)

        def candidates(role):
            yield (known or {}).get(role)
            named = self.role_token(role)
            yield token_to_id(named["content"]) if named else None
            yield model.get(f"{role}_token_id")
            yield token_to_id(ROLES[role])

        def first(role, taken=()):
            ids = (i for i in candidates(role) if type(i) is int and i >= 0 and i not in taken)
            return next(ids, None)

        eos = first("eos")
        if eos is None:
            raise ValueError(f"{self.path!r} does not say which token ends a text: no eos_token")
        return SpecialIds(pad=first("pad", {eos}), eos=eos, bos=first("bos"), unk=first("unk"))

    def extra_ids(self) -> int:
        """How many sentinels the settings say, else T5's 100."""
        count = self.settings.get("extra_ids")
        if count is not None:
            valid = type(count) is int and 0 <= count < 2**16
            _check(valid, self.file(SETTINGS), "extra_ids", count)
            return count
        named = sentinel_ids(lambda text: self.added_tokens.get(text, {}).get("id"))
        return len(named) or EXTRA_IDS

    def check_added_tokens(self, token_to_id: Callable[[str], int | None], main: str) -> None:
        """Checks that the vocabulary has the tokens which the files beside it name.

        A special token without an id gets the next one from transformers, as an added token.

        Args:
            token_to_id: a token's id in the vocabulary, None for one that it does not have.
            main: the vocabulary's own file.

        Raises:
            ValueError: it does not; the message says what to do.
        """
        tokens = self.added_tokens.items()
        missing = [f"{t!r} ({x['id']})" for t, x in tokens if token_to_id(t) != x["id"]]
        special = self.special_tokens().keys() - self.added_tokens.keys()
        missing += [repr(token) for token in sorted(special) if token_to_id(token) is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{self.path!r} names added tokens that its {main} does not have: "
                f"{', '.join(missing[:3])}{more}. Save the tokenizer once more with transformers, "
                f"which puts all into {TOKENIZER}"
            )

    def _token(self, value: Any) -> dict[str, Any]:
        """The fields of a token, which is given by them or as a text."""
        token = {"content": value} if isinstance(value, str) else value
        valid = isinstance(token, dict) and isinstance(token.get("content"), str)
        _check(valid, self.file(SETTINGS), "a token", value)
        return token


def sentinel_ids(token_to_id: Callable[[str], int | None]) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1> ..., as far as a vocabulary has them."""
    ids: list[int] = []
    while True:
        texts = (x.format(len(ids)) for x in (SENTINEL, SPACED_SENTINEL))
        found = next((i for text in texts if (i := token_to_id(text)) is not None), None)
        if found is None:
            return ids
        ids.append(found)


def _check(valid: Any, file: str, field: str, value: Any) -> None:
    if not valid:
        raise ValueError(f"{file!r}: {field} is not what transformers writes: {value!r:.80}")
