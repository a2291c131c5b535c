"""What the tests of language tasks share: their tokens, for a vocabulary of bytes."""

from coda_jax.data.seqio_tasks import seqio_examples

LENGTHS = {"inputs": 512, "targets": 114}


def read(name, split, seed=0, shuffle=False):
    """The tokens of a split, through the reader that training uses."""
    examples = seqio_examples(
        name, split, feature_lengths=LENGTHS, seed=seed, shuffle=shuffle, num_epochs=1
    )
    return [{key: value.tolist() for key, value in example.items()} for example in examples]


def as_bytes(text):
    """The tokens of ByT5: byte + 3, and 1 at the end."""
    return [*(byte + 3 for byte in text.encode()), 1]
