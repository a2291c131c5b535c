"""Texts for the programs of an exported folder: a line is one. Needs nothing but the vocabulary."""

FIELD = "inputs"


def read(line, served, encode):
    """The ids [n] of a text with the end marker, cut to what the programs take.

    Args:
        line: the text.
        served: the programs.
        encode: (text) -> its ids.
    """
    return [*encode(line)[: served.longest - 1], served.manifest["vocabulary"]["eos_id"]]
