"""Words of a text in any script, as metrics compare them."""

import bisect
import unicodedata

# Scripts without spaces between words, each character of which is one: first and last characters.
_UNSPACED = (
    *[(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)],  # Thai and Lao, Myanmar, Khmer
    *[(0x1950, 0x19DF), (0x1A20, 0x1AAF)],  # Tai Le, New Tai Lue; Tai Tham
    *[(0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B)],  # Han in words and numbers
    *[(0x3041, 0x30FF), (0x3105, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)],  # kana, bopomofo
    *[(0x3400, 0x4DBF), (0x4E00, 0x9FFF)],  # Han
    *[(0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xAA80, 0xAADF)],  # Myanmar, Tai Viet
    *[(0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x323AF)],  # Han, kana
)
# Marks that are not seen, beside the characters of the category Cf.
_HIDDEN = frozenset(
    [0x034F, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)
_FIRSTS, _LASTS = zip(*_UNSPACED, strict=True)


def caseless(text: str) -> str:
    """The text as Unicode compares texts without regard to case and to how letters are composed.

    Compatible characters, as full-width letters and ligatures, are the same, as for the
    vocabularies of mT5 and T5; characters that are not seen, such as joiners, are left out.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    seen = (x for x in folded if unicodedata.category(x) != "Cf" and ord(x) not in _HIDDEN)
    return unicodedata.normalize("NFKC", "".join(seen))


def words(text: str, letters: str = "") -> list[str]:
    """Runs of letters, marks and digits, `caseless`; of ASCII the runs of [a-z0-9].

    In scripts that put no spaces between words (Han, kana, Thai, Lao, Khmer, Myanmar) each
    character with its marks is a word.

    Args:
        text: any.
        letters: other characters that count as letters.
    """
    parts = []
    for char in caseless(text):
        kind = unicodedata.category(char)[0]
        if kind not in "LMN" and char not in letters:
            parts.append(" ")
        elif kind == "M" or not _is_unspaced(char):
            parts.append(char)
        else:
            parts.append(f" {char}")
    return "".join(parts).split()


def _is_unspaced(char: str) -> bool:
    place = bisect.bisect_right(_FIRSTS, ord(char)) - 1
    return place >= 0 and ord(char) <= _LASTS[place]
