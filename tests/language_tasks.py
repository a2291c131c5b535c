"""What the tests of language tasks share: their tokens, and the text that noise was made of."""

import itertools

from coda_jax.data.seqio_tasks import seqio_examples

LENGTHS = {"inputs": 512, "targets": 114}


def read(name, split, seed=0, shuffle=False, lengths=None):
    """The tokens of a split, through the reader that training uses."""
    lengths = lengths or LENGTHS
    examples = seqio_examples(
        name, split, feature_lengths=lengths, seed=seed, shuffle=shuffle, num_epochs=1
    )
    return [{key: value.tolist() for key, value in example.items()} for example in examples]


def as_bytes(text):
    """The tokens of ByT5: byte + 3, and 1 at the end."""
    return [*(byte + 3 for byte in text.encode()), 1]


def restored(inputs, targets, sentinels):
    """Undoes span corruption of tokens without EOS: puts spans where the inputs have sentinels.

    The n-th span starts with the n-th sentinel; bytes have sentinels that a text has too.
    """
    merged, place = [], 0
    for sentinel, following in itertools.pairwise([*sentinels, None]):
        if place == len(targets):
            return merged + inputs
        assert targets[place] == sentinel
        at = inputs.index(sentinel)
        end = targets.index(following, place) if following in targets[place:] else len(targets)
        merged += inputs[:at] + targets[place + 1 : end]
        inputs, place = inputs[at + 1 :], end
    assert place == len(targets)
    return merged + inputs
