"""Stop texts as a table that a compiled program can follow, token by token.

The states are how much of a text the last bytes match; a token leads from one to another, and to
the last one if a text is complete within it. Texts are compared as UTF-8 bytes, so that a token may
begin, end or contain a stop text, or be a part of a character.

Axis letters: S states, V vocabulary.
"""

from collections.abc import Sequence

from jaxtyping import UInt8
import numpy as np

from coda_jax.data.vocabularies import Vocabulary

_MOST_STATES = 255  # the greatest number of a state is the last one's


def stop_table(
    vocabulary: Vocabulary, texts: Sequence[str], vocab_size: int
) -> UInt8[np.ndarray, "s v"]:
    """The state [S, V] to which each token leads from each state, S - 1 where a text is complete.

    A search starts in state 0, and after a complete text goes on as from there.

    Args:
        vocabulary: says what each token adds to a text.
        texts: any of them ends an output.
        vocab_size: V, the model's number of tokens; those that the vocabulary lacks add nothing.

    Raises:
        ValueError: the texts are too long for a table.
    """
    encoded = [text.encode() for text in texts]
    prefixes = {text[:end] for text in encoded for end in range(len(text))}
    complete = len(prefixes)
    if complete > _MOST_STATES:
        raise ValueError(
            f"the stop texts have {complete} different beginnings, of at most {_MOST_STATES}"
        )
    # Two processes make the same table, whatever their hash seeds are.
    by_byte = _next_states(sorted(prefixes, key=lambda x: (len(x), x)), encoded)
    pieces = vocabulary.pieces()[:vocab_size]
    lengths = np.zeros(vocab_size, np.int32)
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    order = np.argsort(-lengths, kind="stable")  # tokens with a byte at a place come first
    table = np.repeat(np.arange(complete + 1, dtype=np.uint8)[:, None], vocab_size, axis=1)
    table[complete] = 0
    for place in range(lengths.max(initial=0)):
        longer = order[: np.count_nonzero(lengths > place)]
        byte = np.array([pieces[token][place] for token in longer])
        table[:, longer] = by_byte[table[:, longer], byte]
    return table


def _next_states(prefixes: Sequence[bytes], texts: Sequence[bytes]) -> np.ndarray:
    """[S, 256]: the state after one more byte; a complete text stays complete.

    Args:
        prefixes: of the texts, the shortest first; their places are the states.
        texts: the stop texts.
    """
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    complete = len(prefixes)
    table = np.zeros((complete + 1, 256), np.uint8)
    table[complete] = complete
    for prefix, number in numbers.items():
        # Where no text goes on, what a shorter end of the same bytes would match still counts.
        if prefix:
            ends = (prefix[start:] for start in range(1, len(prefix) + 1))
            table[number] = table[next(numbers[end] for end in ends if end in numbers)]
        for text in texts:
            rest = text[len(prefix) :] if text.startswith(prefix) else b""
            if rest and table[number, rest[0]] != complete:
                longer = prefix + rest[:1]
                table[number, rest[0]] = complete if longer == text else numbers[longer]
    return table


def cut(text: str, texts: Sequence[str], start: int = 0) -> str:
    """The text up to the end of its first stop text.

    Args:
        text: as it was generated.
        texts: the stop texts.
        start: characters that were given, in which no stop text counts.
    """
    ends = [
        found + len(stop)
        for stop in texts
        if (found := text.find(stop, max(0, start - len(stop) + 1))) >= 0
    ]
    return text[: min(ends, default=len(text))]
