"""What is refused in a SentencePiece file before the library reads it.

SentencePiece 0.2.1, and the one in tensorflow-text, crash at it; 0.2.2 refuses the same.
"""

from collections.abc import Iterator

import numpy as np

# Fields of a message, of ModelProto and of NormalizerSpec.
_PIECE, _NORMALIZERS, _CHARSMAP = 1, (3, 5), 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how a field is written
_MAX_PIECE = 8000  # bytes of a piece with its score and its type
_ROW = 256  # entries of the rules' table are in rows, one entry a byte


def check_model(model: bytes) -> None:
    """Raises ValueError where a piece is too long, or rules lead out of their table.

    Other damage is left to the library, which names it.
    """
    for number, value in _fields(model):
        if number == _PIECE and len(value) > _MAX_PIECE:
            raise ValueError(f"a piece has {len(value):,} bytes; at most {_MAX_PIECE:,} are read")
        if number in _NORMALIZERS:
            for inner, rules in _fields(value):
                if inner == _CHARSMAP and rules:
                    _check_rules(rules)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each field of bytes in a message of Protocol Buffers."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, place = _varint(message, place)
        elif kind == _BYTES:
            size, place = _varint(message, place)
            if size > len(message) - place:
                raise ValueError("it ends within a field")
            yield number, message[place : place + size]
            place += size
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field {number} is of the unknown kind {kind}")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number, 7 bits a byte, the lowest first, and the place behind it."""
    value = shift = 0
    while place < len(message) and shift < 64:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("it ends within a number, or a number is too large")


def _check_rules(rules: bytes) -> None:
    """Checks a precompiled_charsmap: the size of a table, the table, the texts that it points to.

    The table is a double array: from an entry, a byte leads to the entry at its own place XOR the
    entry's offset XOR the byte. What a text ends at is an entry with the highest bit, and a place
    in the texts.
    """
    size = int.from_bytes(rules[:4], "little")
    texts = rules[4 + size :]
    if size == 0 or size % (4 * _ROW) or not texts.endswith(b"\0"):
        raise ValueError("its precompiled_charsmap is damaged")
    table = np.frombuffer(rules, "<u4", size // 4, 4).astype(np.int64)
    ends = table >> 31 == 1
    shifts = np.where(table & 1 << 9, 8, 0)  # a far offset is in units of a row
    starts = np.arange(len(table)) ^ (table >> 10 << shifts)
    leads_out = ~ends & (starts | _ROW - 1 >= len(table))
    has_end = ~ends & ~leads_out & (table & 1 << 8 > 0)
    no_end = ~ends[starts[has_end]]
    no_text = ends & (table & 2**31 - 1 >= len(texts))
    if ends[0] or leads_out.any() or no_end.any() or no_text.any():
        raise ValueError("its precompiled_charsmap leads out of its own table")
