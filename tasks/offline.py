"""Tasks that need no download: text-to-text tasks over Python's standard library.

Importing this module registers the tasks for the bundled SentencePiece vocabulary, and again with
the suffix "_bytes" for bytes. `python -m coda_jax.tasks.offline --write_vocabulary=DIR` trains the
vocabulary.

Adaptation tasks: `stdlib_module` (function -> its top-level module), `stdlib_module_windows` (from
random windows of its training functions) and `stdlib_exception` (function -> the exception that it
raises). For `coda ood`: `stdlib_module_known` is `stdlib_module` without a quarter of the modules,
`stdlib_module_known_windows` has its windows, `stdlib_module_held_out` is that quarter, and
`stdlib_module_docstrings` has docstrings for functions.
Pretraining: the mixture `stdlib_pretrain` of span corruption and five supervised tasks,
over the functions of the train split and the files' other text.
"""

import argparse
import collections
from collections.abc import Sequence
import functools
import os
import pathlib
import re

import seqio
import tensorflow as tf

from coda_jax import bundled
from coda_jax.data import seqio_tasks, vocabulary_files
from coda_jax.data.vocabulary_files import EXTRA_IDS, SPIECE
from coda_jax.ood.known import split_labels
from coda_jax.tasks import preprocessors, stdlib_corpus

VOCABULARY_FILE = str(bundled.VOCABULARY / SPIECE)
NUM_PIECES = 3996  # 4,096 ids together with the extra ids.

MIN_CLASS_SIZE = 10
HELD_OUT = 0.25  # of the modules
PASSAGE_BYTES = 1000
WINDOW_TOKENS = 56
NUM_NAMES = 2  # of a file without a docstring
SENTINEL = vocabulary_files.SENTINEL.format(0)
PRETRAIN_RATES = {
    "stdlib_passage": 7.0,
    "stdlib_summary": 1.5,
    "stdlib_siblings": 0.5,
    "stdlib_function_name": 0.25,
    "stdlib_docstring": 0.25,
    "stdlib_span_corruption": 0.5,
}

_Columns = dict[str, list[str]]


def _functions(split: str) -> list[stdlib_corpus.Function]:
    return [f for f in stdlib_corpus.read_corpus().functions if f.split == split]


def _pairs(pairs) -> _Columns:
    inputs, targets = zip(*pairs, strict=True)
    return {"inputs": list(inputs), "targets": list(targets)}


def mask_name(source: str, name: str, flags: int = 0) -> str:
    """Replaces every standalone occurrence of a name by a sentinel.

    Args:
        source: Python source or other text.
        name: an identifier.
        flags: of `re`.

    Returns:
        The source with the sentinel's text, after a space: SentencePiece knows it only there.
    """
    return re.sub(rf" ?(?<!\w){re.escape(name)}(?!\w)", " " + SENTINEL, source, flags=flags)


@functools.lru_cache(maxsize=1)
def module_classes() -> tuple[str, ...]:
    """Returns the classes of `stdlib_module`: modules with at least `MIN_CLASS_SIZE` functions."""
    sizes = collections.Counter(f.module for f in stdlib_corpus.read_corpus().functions)
    return tuple(sorted(m for m, size in sizes.items() if size >= MIN_CLASS_SIZE))


def _module(split: str, prefix: str = "module: ") -> _Columns:
    classes = frozenset(module_classes())
    return _pairs((prefix + f.source, f.module) for f in _functions(split) if f.module in classes)


@functools.lru_cache(maxsize=1)
def held_out_modules() -> tuple[str, ...]:
    """Returns the modules that `stdlib_module_known` lacks, drawn once and for all."""
    return split_labels(module_classes(), HELD_OUT)[1]


def _some_modules(split: str, held_out: bool, prefix: str = "module: ") -> _Columns:
    columns = _module(split, prefix)
    pairs = zip(columns["inputs"], columns["targets"], strict=True)
    return _pairs(pair for pair in pairs if (pair[1] in held_out_modules()) == held_out)


def _module_of_docstring(split: str) -> _Columns:
    return _pairs(("module: " + f.docstring, f.module) for f in _functions(split) if f.docstring)


def _exception(split: str) -> _Columns:
    return _pairs(
        ("exception: " + f.source, f.exceptions[0])
        for f in _functions(split)
        if len(f.exceptions) == 1
    )


def _function_name(split: str) -> _Columns:
    return _pairs(("name: " + mask_name(f.source, f.name), f.name) for f in _functions(split))


def _docstring(split: str) -> _Columns:
    return _pairs(
        ("docstring: " + f.undocumented, f.docstring) for f in _functions(split) if f.docstring
    )


def _names() -> dict[str, list[str]]:
    """The names of classes and training functions that each file defines, by path."""
    names = {file.path: list(file.classes) for file in stdlib_corpus.read_corpus().files}
    for function in _functions("train"):
        names[function.file].append(function.name)
    return {path: list(dict.fromkeys(found)) for path, found in names.items()}


def _summaries() -> dict[str, str]:
    """A line about each file, by path: the first of its docstring, or else names that it defines.

    The file's own module is masked: `stdlib_module` is not a pretraining task.
    """
    lines = {}
    names = _names()
    for file in stdlib_corpus.read_corpus().files:
        line = file.summary or " ".join(["defines", *names[file.path][:NUM_NAMES]])
        lines[file.path] = mask_name(line, file.module, re.IGNORECASE)
    return lines


def _summary(split: str) -> _Columns:
    summaries = _summaries()
    return _pairs(("summary: " + f.source, summaries[f.file]) for f in _functions(split))


def _passage(split: str) -> _Columns:
    """What `stdlib_summary` asks, of windows of whole files: of their classes and constants too."""
    if split == "train":
        texts = [(file.undocumented, file.path) for file in stdlib_corpus.read_corpus().files]
    else:
        texts = [(f.source, f.file) for f in _functions(split)]
    summaries = _summaries()
    return _pairs(
        (passage, summaries[path])
        for text, path in texts
        for passage in passages(text, PASSAGE_BYTES)
    )


def passages(text: str, min_bytes: int) -> list[str]:
    """Cuts a text into runs of whole lines.

    Args:
        text: any text.
        min_bytes: a run ends with the line that brings it to this size; the last may be smaller.

    Returns:
        The runs, which together are the text.
    """
    found, start, size = [], 0, 0
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines, start=1):
        size += len(line.encode())
        if size >= min_bytes or i == len(lines):
            found.append("".join(lines[start:i]))
            start, size = i, 0
    return found


def _siblings(split: str) -> _Columns:
    """The targets are all names in the file that may be asked for; `_sample_name` draws one."""
    names = _names()
    rows = []
    for f in _functions(split):
        others = [n for n in names[f.file] if n not in (f.name, f.module)]
        if others:
            rows.append(("siblings: " + mask_name(f.source, f.name), " ".join(others)))
    return _pairs(rows)


def _texts(split: str) -> _Columns:
    if split == "train":
        texts = [file.text for file in stdlib_corpus.read_corpus().files]
    else:
        texts = [f.source for f in _functions(split)]
    return {"targets": texts}


@seqio.map_over_dataset(num_seeds=1)
def _sample_name(example, seed):
    names = tf.strings.split(example["targets"], " ")
    return {**example, "targets": tf.random.experimental.stateless_shuffle(names, seed)[0]}


def _add_task(name, load, vocabulary, splits, steps, metric_fns=(), shuffle_buffer_size=1):
    def load_checked(split):
        check_vocabulary_file(vocabulary)
        return load(split)

    return seqio_tasks.add_task(
        name,
        seqio_tasks.MemorySource(load_checked, splits),
        steps,
        vocabulary,
        metric_fns=metric_fns,
        shuffle_buffer_size=shuffle_buffer_size,
    )


def check_vocabulary_file(vocabulary: seqio.Vocabulary) -> None:
    """Raises FileNotFoundError, saying how to make it, if the vocabulary's file is missing."""
    path = getattr(vocabulary, "sentencepiece_model_file", None)
    if path and not tf.io.gfile.exists(path):
        raise FileNotFoundError(
            f"No vocabulary at {path!r}. Write it with "
            "`python -m coda_jax.tasks.offline --write_vocabulary=DIR`"
        )


def add_tasks(vocabulary: seqio.Vocabulary, suffix: str = "") -> seqio.Mixture:
    """Registers all tasks of this module and the mixture `stdlib_pretrain` for a vocabulary.

    Args:
        vocabulary: for inputs and targets; span corruption uses its extra ids.
        suffix: is added to each name.

    Returns:
        The mixture.

    Raises:
        ValueError: a task of such a name is registered already.
    """
    tokenize = seqio.preprocessors.tokenize
    for name, load in (
        ("stdlib_module", _module),
        ("stdlib_module_known", functools.partial(_some_modules, held_out=False)),
        ("stdlib_module_held_out", functools.partial(_some_modules, held_out=True)),
        ("stdlib_module_docstrings", _module_of_docstring),
        ("stdlib_exception", _exception),
    ):
        splits = ("train", "validation", "test")
        _add_task(name + suffix, load, vocabulary, splits, [tokenize], [seqio_tasks.accuracy])
    splits = ("train", "validation")
    whole = functools.partial(_module, prefix="")  # The windows get the prefix.
    known = functools.partial(_some_modules, held_out=False, prefix="")
    for name, load, prefix, window_splits in (
        ("stdlib_module_windows", whole, "module: ", ("train",)),
        ("stdlib_module_known_windows", known, "module: ", ("train",)),
        ("stdlib_passage", _passage, "summary: ", splits),
    ):
        window = functools.partial(
            preprocessors.random_window, num_tokens=WINDOW_TOKENS, prefix=prefix
        )
        _add_task(name + suffix, load, vocabulary, window_splits, [tokenize, window])
    for name, load, first in (
        ("stdlib_function_name", _function_name, []),
        ("stdlib_docstring", _docstring, []),
        ("stdlib_summary", _summary, []),
        ("stdlib_siblings", _siblings, [_sample_name]),
    ):
        steps = [*first, tokenize]
        _add_task(name + suffix, load, vocabulary, splits, steps, [seqio_tasks.accuracy])
    corruption_steps = [
        functools.partial(tokenize, copy_pretokenized=False),
        preprocessors.span_corruption,
    ]
    _add_task(
        "stdlib_span_corruption" + suffix,
        _texts,
        vocabulary,
        splits,
        corruption_steps,
        shuffle_buffer_size=1000,  # Neighbours are parts of one text.
    )
    return seqio.MixtureRegistry.add(
        "stdlib_pretrain" + suffix, [(name + suffix, rate) for name, rate in PRETRAIN_RATES.items()]
    )


def write_vocabulary(directory: str | os.PathLike) -> pathlib.Path:
    """Trains the SentencePiece vocabulary on the functions of the train split.

    White space is kept as it is: line ends and runs of spaces are pieces or parts of pieces, and
    what no piece covers falls back to bytes.

    Args:
        directory: where `spiece.model` is written; made if it does not exist.

    Returns:
        The path of the file.
    """
    import sentencepiece  # Here, because only the training needs it.

    path = pathlib.Path(directory) / SPIECE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([function.source for function in _functions("train")]),
            model_writer=f,
            model_type="unigram",
            vocab_size=NUM_PIECES,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # No user-defined symbols: where two of them tie, versions of SentencePiece differ.
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            seed_sentencepiece_size=100_000,
            max_sentence_length=2 * stdlib_corpus.MAX_BYTES,
            num_threads=2,
            minloglevel=2,
        )
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Trains the vocabulary of the stdlib tasks.")
    parser.add_argument("--write_vocabulary", metavar="DIR", required=True)
    print(write_vocabulary(parser.parse_args(argv).write_vocabulary))


add_tasks(seqio.SentencePieceVocabulary(VOCABULARY_FILE, extra_ids=EXTRA_IDS))
add_tasks(seqio_tasks.seqio_vocabulary("bytes"), suffix="_bytes")

if __name__ == "__main__":
    main()
