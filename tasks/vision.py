"""Image tasks of the paper's experiments as seqio tasks, and one over a folder of one's own.

`task(name, vocabulary, directory)` registers one of `SPECS` over a folder with the files of the
original release, as they are unpacked: OCR-VQA, DocVQA, Screen2Words. `image_folder` takes JSONL
files and images. Nothing is downloaded. Questions are drawn above the images.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import seqio

from coda_jax import files
from coda_jax.data.rows import Field, cells, read_rows
from coda_jax.data.seqio_tasks import MemorySource, accuracy, seqio_vocabulary, strip_text
from coda_jax.tasks import cider, images, metrics, registry, tables

SPLITS = ("train", "validation", "test")
OCR_VQA_SPLITS = {"train": 1, "validation": 2, "test": 3}
DOCVQA_SPLITS = {"train": "train", "validation": "val"}  # The test split has no answers.
SCREEN2WORDS_SPLITS = {"train": "train", "validation": "dev", "test": "test"}

_Columns = dict[str, list[str]]


def _columns(rows: Sequence[tuple[str, str, str, Sequence[str]]], where: str) -> _Columns:
    """Columns of (image, header, target, all right answers)."""
    if not rows:
        raise ValueError(f"{where}: there are no examples of this split")
    paths, headers, targets, answers = zip(*rows, strict=True)
    return {
        "image": list(paths),
        "header": list(headers),
        "targets": list(targets),
        "answers": [json.dumps(list(texts)) for texts in answers],
    }


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: there must be an object of records, not {value!r:.80}")
    return value


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    """Returns a field of a record; ValueError names the place where it is missing or wrong."""
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name!r} must be a {kind.__name__}, not {value!r}")
    return value


def _texts(record: Any, name: str, where: str) -> list[str]:
    values = _field(record, name, list, where)
    if not values or not all(isinstance(text, str) for text in values):
        raise ValueError(f"{where}: {name!r} must be a list of texts, not {values!r}")
    return values


def read_ocr_vqa(directory: str, split: str) -> _Columns:
    """Reads a split of OCR-VQA (Mishra et al. 2019): `dataset.json` and `images/<key>.<ending>`.

    The ending is that of the image's URL, as the release's own script saves it.

    Args:
        directory: where they lie.
        split: one of `SPLITS`.

    Returns:
        The columns "image", "header", "targets" and "answers" (JSON).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not as published; the place is named.
    """
    path = os.path.join(directory, "dataset.json")
    rows = []
    for key, record in _object(tables.read_json(path), path).items():
        where = f"{path}: {key!r}"
        if _field(record, "split", int, where) != OCR_VQA_SPLITS[split]:
            continue
        ending = os.path.splitext(_field(record, "imageURL", str, where))[1]
        image = os.path.join(directory, "images", key + ending)
        questions, answers = (_texts(record, name, where) for name in ("questions", "answers"))
        if len(questions) != len(answers):
            raise ValueError(f"{where}: {len(questions)} questions and {len(answers)} answers")
        rows += [(image, q, a, [a]) for q, a in zip(questions, answers, strict=True)]
    return _columns(rows, path)


def read_docvqa(directory: str, split: str) -> _Columns:
    """Reads a split of DocVQA (Mathew et al. 2021): `train/train_v1.0.json`, `train/documents/`.

    In training each right answer is an example; otherwise each question is one.

    Args:
        directory: where the folders `train` and `val` lie.
        split: "train" or "validation".

    Returns:
        As `read_ocr_vqa`.

    Raises:
        FileNotFoundError, ValueError: as `read_ocr_vqa`.
    """
    folder = os.path.join(directory, DOCVQA_SPLITS[split])
    path = os.path.join(folder, f"{DOCVQA_SPLITS[split]}_v1.0.json")
    rows = []
    for number, record in enumerate(_field(tables.read_json(path), "data", list, path)):
        where = f"{path}: data[{number}]"
        question, image = (_field(record, name, str, where) for name in ("question", "image"))
        answers = _texts(record, "answers", where)
        for answer in dict.fromkeys(answers if split == "train" else answers[:1]):
            rows.append((os.path.join(folder, image), question, answer, answers))
    return _columns(rows, path)


def read_screen2words(directory: str, split: str) -> _Columns:
    """Reads a split of Screen2Words (Wang et al. 2021).

    In training each summary is an example; otherwise each screen is one.

    Args:
        directory: has `screen_summaries.csv`, `split/{train,dev,test}_screens.txt`, and in
            `combined/<screenId>.jpg` the screens of RICO.
        split: one of `SPLITS`.

    Returns:
        As `read_ocr_vqa`; the headers are empty.

    Raises:
        FileNotFoundError, ValueError: as `read_ocr_vqa`.
    """
    path = os.path.join(directory, "screen_summaries.csv")
    summaries: dict[str, list[str]] = {}
    lines = cells(pathlib.Path(path).read_bytes(), path)
    _, columns = next(lines, (1, []))
    for number, fields in lines:
        row = dict(zip(columns, fields, strict=False))
        if fields and not (row.get("screenId") and row.get("summary")):
            raise ValueError(f"{path}:{number}: no 'screenId' or 'summary': {row!r}")
        if fields:
            summaries.setdefault(row["screenId"], []).append(row["summary"])
    names = os.path.join(directory, "split", f"{SCREEN2WORDS_SPLITS[split]}_screens.txt")
    rows = []
    with open(names, "rb") as f:
        for screen in files.decoded(f.read(), names).split():
            if screen not in summaries:
                raise ValueError(f"{names}: {path} has no summary of the screen {screen!r}")
            texts = summaries[screen]
            image = os.path.join(directory, "combined", f"{screen}.jpg")
            for summary in texts if split == "train" else texts[:1]:
                rows.append((image, "", summary, texts))
    return _columns(rows, names)


def read_image_folder(directory: str, split: str) -> _Columns:
    """Reads `<split>.jsonl`, whose lines are {"image": file, "header": question, "targets": text}.

    Args:
        directory: where the JSONL files lie, and where the images' paths start.
        split: one of `SPLITS`.

    Returns:
        As `read_ocr_vqa`; a line without "header" has none.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; or a row lacks a field.
    """
    path = os.path.join(directory, f"{split}.jsonl")
    image, header, targets = map(Field, ("image", "header", "targets"))
    rows = []
    for row in read_rows(path):
        question = header.text(row) if "header" in row.fields else ""
        target = targets.text(row)
        rows.append((os.path.join(directory, image.text(row)), question, target, [target]))
    return _columns(rows, path)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of `SPECS`.

    Attributes:
        read: (directory, split) -> columns.
        splits: those with labels.
        metric_fns: of seqio.
        postprocess: seqio's `postprocess_fn`.
    """

    read: Callable[[str, str], _Columns]
    splits: Sequence[str]
    metric_fns: Sequence[Callable]
    postprocess: Callable = metrics.json_answers


SPECS = {
    "ocr_vqa": Spec(read_ocr_vqa, SPLITS, (accuracy,), strip_text),
    "docvqa": Spec(read_docvqa, tuple(DOCVQA_SPLITS), (metrics.anls,)),
    "screen2words": Spec(read_screen2words, SPLITS, (cider.cider, metrics.rouge_of_any)),
    "image_folder": Spec(read_image_folder, SPLITS, (accuracy,), strip_text),
}


def task(
    name: str, vocabulary: str, directory: str, font: str | None = None, patch_size: int = 16
) -> str:
    """Registers a task, once, and returns the name that it has in seqio. For gin files.

    Args:
        name: a key of `SPECS`.
        vocabulary: a path, or "bytes", for `seqio_tasks.seqio_vocabulary`.
        directory: the folder with the release's files.
        font: TrueType file of the headers; None for the `DEFAULT_FONT` of `coda_jax.data.images`.
        patch_size: the model's.

    Returns:
        "<name>_<hash of the arguments>".

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: there is no such vocabulary.
    """
    spec = registry.find("image", name, SPECS)

    def add(registered: str) -> seqio.Task:
        splits = spec.splits
        if spec.read is read_image_folder:
            splits = registry.splits_of(directory, splits, ".jsonl")
        return images.add_task(
            registered,
            MemorySource(functools.partial(spec.read, directory), splits),
            images.load_images(font),
            seqio_vocabulary(vocabulary),
            patch_size=patch_size,
            postprocess_fn=spec.postprocess,
            metric_fns=spec.metric_fns,
        )

    return registry.once(name, (name, vocabulary, directory, font, patch_size), add)
