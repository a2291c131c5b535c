"""Whether an audio file is whole, by what its container says of itself.

Decoders read a file that ends early up to there, without a word, and skip damaged parts. So every
size that a container declares is compared with the file's, every page and frame has to follow the
one before it, and checksums are verified where the format has them.
"""

from collections.abc import Callable, Iterator
import functools
import hashlib
import mmap
import re
import struct
import zlib

import numpy as np

Content = bytes | mmap.mmap

_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # which programs write that do not know how much is to come
_PAIRS_AT_ONCE = 2**16  # as numbers of Python
_ZEROS = re.compile(rb"\0*")


def check_whole(content: Content) -> None:
    """Raises ValueError for a file that ends early, is damaged, or of another kind.

    Args:
        content: of the file.
    """
    start = _after_id3(content, 0)
    magic = bytes(content[start : start + 12])
    magic = magic[8:] if magic[:4] == b"FORM" else magic  # which pictures are, too
    for known, check in _CHECKS.items():
        if magic.startswith(known):
            return check(content, start)
    if len(content) < 4 or not _mp3_frame(content, start + _zeros(content, start)):
        raise ValueError(f"it is none of {', '.join(FORMATS)}")
    return _check_mp3(content, start)


def _check_end(what: str, end: int, content: Content) -> None:
    if end > len(content):
        raise ValueError(
            f"it ends early: it has {len(content):,} bytes, its {what} ends at {end:,}"
        )


def _check_riff(content: Content, start: int) -> None:
    """WAV and RF64, and AIFF, which numbers the other way round."""
    order = "<" if content[start : start + 3] in (b"RIF", b"RF6") else ">"
    order = ">" if content[start : start + 4] == b"RIFX" else order
    (declared,) = _unpack(order + "I", content, start + 4)
    data_sizes = {}
    if content[start : start + 4] == b"RF64":
        declared, data_sizes[b"data"] = _unpack("<QQ", content, start + 20)
    unknown = declared in _UNKNOWN_SIZES
    if not unknown:
        _check_end("container", start + 8 + declared, content)
    place = start + 12
    while place + 8 <= len(content):
        name, size = content[place : place + 4], _unpack(order + "I", content, place + 4)[0]
        if name in (b"data", b"SSND"):
            size = data_sizes.get(bytes(name), size) if size == 0xFFFFFFFF else size
            if size in _UNKNOWN_SIZES and unknown:
                return
            return _check_end("sound", place + 8 + size, content)
        place += 8 + size + size % 2


def _check_w64(content: Content, start: int) -> None:
    """Sony Wave64: sizes of 64 bits, which count their own headers of 24 bytes."""
    (declared,) = _unpack("<Q", content, start + 16)
    _check_end("container", start + declared, content)
    place = start + 40
    while place + 24 <= len(content):
        (size,) = _unpack("<Q", content, place + 16)
        if content[place : place + 4] == b"data":
            return _check_end("sound", place + size, content)
        place += max(24, size + -size % 8)


def _check_au(content: Content, start: int) -> None:
    order = ">" if content[start : start + 4] == b".snd" else "<"
    offset, size = _unpack(order + "II", content, start + 4)
    if size != 0xFFFFFFFF:
        _check_end("sound", start + offset + size, content)


def _check_caf(content: Content, start: int) -> None:
    place = start + 8
    while place + 12 <= len(content):
        (size,) = _unpack(">q", content, place + 4)
        if size == -1 and content[place : place + 4] == b"data":
            return  # up to the end
        if size < 0:
            raise ValueError(f"a part at byte {place:,} has the size {size}")
        _check_end("parts", place + 12 + size, content)
        place += 12 + size


def _check_ogg(content: Content, start: int) -> None:
    """Every page with its checksum, in order, and each stream with its last page."""
    open_streams: dict[int, int] = {}
    place = start
    while place < len(content):
        if content[place : place + 4] != b"OggS":
            raise ValueError(f"there is no page at byte {place:,}")
        flags, stream, number, checksum, segments = _unpack("<5xB8xIIIB", content, place)
        body = place + 27 + segments
        end = body + sum(content[place + 27 : body])
        _check_end("last page", end, content)
        page = bytearray(content[place:end])
        page[22:26] = bytes(4)
        if _ogg_checksum(page) != checksum:
            raise ValueError(f"the page at byte {place:,} is damaged: its checksum is another one")
        if number != open_streams.get(stream, number):
            raise ValueError(f"pages are missing before byte {place:,}")
        open_streams[stream] = number + 1
        if flags & 4:
            del open_streams[stream]
        place = end
    if open_streams:
        raise ValueError("it ends early: its last page is not marked as the last one")


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with the bits in the other order than zlib's, and without its inversions."""
    found = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(found.to_bytes(4, "little").translate(_REVERSED), "big")


def flac_digest(content: Content) -> tuple[Callable[[np.ndarray], None], Callable[[], None]] | None:
    """The checksum of a FLAC's samples: (add samples, compare); None where it has none.

    Args:
        content: of the file.
    """
    start = _after_id3(content, 0)
    if content[start : start + 4] != b"fLaC":
        return None
    (packed,) = _unpack(">Q", content, start + 18)
    bits = (packed >> 36 & 0x1F) + 1
    expected, digest = bytes(content[start + 26 : start + 42]), hashlib.md5(usedforsecurity=False)
    if not any(expected):
        return None

    def add(samples: np.ndarray) -> None:
        """Samples [n, channels] of -1 to 1."""
        numbers = np.rint(samples * 2.0 ** (bits - 1)).astype("<i4")
        octets = numbers.view(np.uint8).reshape(*numbers.shape, 4)
        digest.update(octets[..., : -(-bits // 8)].tobytes())

    def compare() -> None:
        if digest.digest() != expected:
            raise ValueError("its samples are damaged: their checksum is another one")

    return add, compare


def _check_flac(content: Content, start: int) -> None:
    _check_end("header", start + 42, content)


# By version (2.5, none, 2, 1) and layer (none, III, II, I), kbit/s of the indices 1 to 14.
_MPEG_1 = {
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
}
_MPEG_2 = {
    1: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
}
_HERTZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _mp3_frame(content: Content, place: int) -> int:
    """The bytes of the MPEG audio frame at a place; 0 where there is none."""
    head = bytes(content[place : place + 4])
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer, rate, hertz = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 0 or rate in (0, 15) or hertz == 3:
        return 0
    bits = (_MPEG_1 if version == 3 else _MPEG_2)[layer][rate - 1] * 1000
    padding, hertz = head[2] >> 1 & 1, _HERTZ[version][hertz]
    if layer == 3:
        return (12 * bits // hertz + padding) * 4
    slots = 72 if layer == 1 and version != 3 else 144
    return slots * bits // hertz + padding


def _check_mp3(content: Content, start: int) -> None:
    """Every frame behind the one before it, up to the end, and as many as the first one says."""
    place = first = start + _zeros(content, start)
    count = 0
    while size := _mp3_frame(content, place):
        _check_end("last frame", place + size, content)
        place, count = place + size, count + 1
    declared, checksum = _mp3_claims(content, first)
    if declared is not None and count - 1 < declared:
        raise ValueError(f"it ends early, or is damaged: {count - 1:,} of {declared:,} frames")
    if checksum and _crc_16(content[first + _mp3_frame(content, first) : place]) != checksum:
        raise ValueError("its frames are damaged: their checksum is another one")
    for end in _tags(content, place):
        place = end
    if place + _zeros(content, place) != len(content):
        raise ValueError(f"there is no frame at byte {place:,} of {len(content):,}")


def _mp3_claims(content: Content, place: int) -> tuple[int | None, int]:
    """What an MP3's first frame may say of those behind it: how many, and their checksum, or 0."""
    mpeg_1, mono = content[place + 1] >> 3 & 3 == 3, content[place + 3] >> 6 == 3
    info = place + 4 + ((17 if mono else 32) if mpeg_1 else (9 if mono else 17))
    if content[info : info + 4] in (b"Xing", b"Info") and len(content) >= info + 156:
        (flags,) = _unpack(">I", content, info + 4)
        frames = _unpack(">I", content, info + 8)[0] if flags & 1 else None
        parts = ((1, 4), (2, 4), (4, 100), (8, 4))
        end = info + 8 + sum(size for flag, size in parts if flags & flag) + 34
        music, own = _unpack(">HH", content, end - 2)
        # LAME's part is there if its own checksum is right.
        return frames, music if own == _crc_16(content[place:end]) else 0
    old = bytes(content[place + 36 : place + 54])
    known = old[:4] == b"VBRI" and len(old) == 18
    return (struct.unpack(">I", old[14:])[0] if known else None), 0


def _crc_16(content: bytes) -> int:
    """CRC-16 with the polynomial 0x8005, from the lowest bit on, two bytes at a time."""
    table, found = _crc_16_table(), 0
    pairs = np.frombuffer(content[: len(content) // 2 * 2], "<u2")
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        for pair in pairs[start : start + _PAIRS_AT_ONCE].tolist():
            found = table[found ^ pair]
    if len(content) % 2:
        found = found >> 8 ^ table[(found ^ content[-1]) << 8 & 0xFFFF]
    return found


@functools.cache
def _crc_16_table() -> list[int]:
    """The checksum behind each state of 16 bits, when 16 bits of 0 have come."""
    states = np.arange(2**16)
    for _ in range(16):
        states = states >> 1 ^ 0xA001 * (states & 1)
    return states.tolist()


def _after_id3(content: Content, place: int) -> int:
    """The place behind the tags of ID3 version 2 that begin at a place."""
    while content[place : place + 3] == b"ID3" and len(content) >= place + 10:
        flags, *sizes = content[place + 5 : place + 10]
        size = functools.reduce(lambda size, byte: size << 7 | byte & 0x7F, sizes, 0)
        place += 10 + size + (10 if flags & 0x10 else 0)
    return place


def _tags(content: Content, place: int) -> Iterator[int]:
    """The places behind the tags at the end of an MP3, one after the other."""
    while True:
        before, place = place, _after_id3(content, place)
        if content[place : place + 8] == b"APETAGEX":
            size, flags = _unpack("<12xI4xI", content, place)
            # A header of 32 bytes is not counted; a footer is.
            place += 32 + (size if flags & 1 << 29 else 0)
        elif content[place : place + 11] == b"LYRICSBEGIN":
            end = content.find(b"LYRICS", place + 11)
            place = place if end < 0 else end + 9
        elif content[place : place + 3] == b"TAG":
            place += 128
        if place == before:
            return
        yield place


def _zeros(content: Content, place: int) -> int:
    """How many bytes of 0 there are from a place on."""
    found = _ZEROS.match(content, place)
    return found.end() - found.start()


def _unpack(form: str, content: Content, place: int) -> tuple:
    end = place + struct.calcsize(form)
    _check_end("header", end, content)
    return struct.unpack(form, content[place:end])


_CHECKS: dict[bytes, Callable[[Content, int], None]] = {
    **dict.fromkeys((b"RIFF", b"RIFX", b"RF64", b"AIFF", b"AIFC"), _check_riff),
    b"riff": _check_w64,
    **dict.fromkeys((b".snd", b"dns."), _check_au),
    b"caff": _check_caf,
    b"fLaC": _check_flac,
    b"OggS": _check_ogg,
}
FORMATS = ("WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3")
