"""ByT5's vocabulary, the bytes of UTF-8. Needs nothing."""


def load(folder, said):
    """(text -> ids, ids -> text), both without the end marker."""
    del folder, said
    return encode, decode


def encode(text):
    """The bytes, behind padding, end marker and unknown."""
    return [byte + 3 for byte in text.encode()]


def decode(ids):
    """The text of those ids that are bytes."""
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="ignore")
