"""OCR-VQA, DocVQA and Screen2Words from files of the releases' layouts, and their metrics."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
import seqio

from coda_jax.data import images
from coda_jax.data.seqio_tasks import seqio_examples
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.tasks import metrics, vision

ALPHABET = st.text("abC ", max_size=8)


def save_image(path, rng, size=(24, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture(name="ocr_vqa")
def fixture_ocr_vqa(tmp_path, rng):
    records = {}
    for number, split in enumerate((1, 1, 2, 3)):
        key = f"07611832{number}"
        records[key] = {
            "imageURL": f"http://ecx.images.example/I/{key}.jpg",
            "questions": ["Who wrote this book?", "What is its title?"],
            "answers": [f"Author {number}", f"Title {number}"],
            "title": f"Title {number}",
            "authorName": f"Author {number}",
            "genre": "Travel",
            "split": split,
        }
        save_image(tmp_path / "images" / f"{key}.jpg", rng)
    (tmp_path / "dataset.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture(name="docvqa")
def fixture_docvqa(tmp_path, rng):
    for split in ("train", "val"):
        save_image(tmp_path / split / "documents" / "page_1.png", rng)
        record = {
            "questionId": 337,
            "question": "What is the date?",
            "image": "documents/page_1.png",
            "docId": 279,
            "ucsf_document_id": "page",
            "answers": ["1/8/93", "January 8, 93", "1/8/93"],
            "data_split": split,
        }
        content = {"dataset_name": "docvqa", "dataset_split": split, "data": [record]}
        (tmp_path / split / f"{split}_v1.0.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture(name="screen2words")
def fixture_screen2words(tmp_path, rng):
    lines = ["screenId,summary"]
    (tmp_path / "split").mkdir()
    for screen, split in ((11, "train"), (12, "train"), (20, "dev"), (30, "test")):
        lines += [f'{screen},"list of, songs {screen}"', f"{screen},a music app"]
        save_image(tmp_path / "combined" / f"{screen}.jpg", rng)
        with open(tmp_path / "split" / f"{split}_screens.txt", "a") as f:
            f.write(f"{screen}\n")
    (tmp_path / "screen_summaries.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def read(name, folder, split):
    """(image's name, header, target, answers) of each row."""
    columns = vision.SPECS[name].read(str(folder), split)
    names = [path.removeprefix(str(folder) + "/") for path in columns["image"]]
    answers = [json.loads(text) for text in columns["answers"]]
    return list(zip(names, columns["header"], columns["targets"], answers, strict=True))


def test_ocr_vqa_has_a_row_for_each_question_of_the_split(ocr_vqa):
    rows = read("ocr_vqa", ocr_vqa, "train")
    assert len(rows) == 4
    assert rows[3] == ("images/076118321.jpg", "What is its title?", "Title 1", ["Title 1"])
    assert [row[2] for row in read("ocr_vqa", ocr_vqa, "test")] == ["Author 3", "Title 3"]


def test_docvqa_trains_on_each_answer_and_is_judged_by_all(docvqa):
    answers = ["1/8/93", "January 8, 93", "1/8/93"]
    rows = read("docvqa", docvqa, "train")
    assert [row[2] for row in rows] == answers[:2]
    (row,) = read("docvqa", docvqa, "validation")
    assert row == ("val/documents/page_1.png", "What is the date?", "1/8/93", answers)
    assert "test" not in vision.SPECS["docvqa"].splits


def test_screen2words_trains_on_each_summary_and_is_judged_by_all(screen2words):
    rows = read("screen2words", screen2words, "train")
    assert [row[2] for row in rows] == [
        *("list of, songs 11", "a music app", "list of, songs 12", "a music app")
    ]
    (row,) = read("screen2words", screen2words, "test")
    assert row == ("combined/30.jpg", "", "list of, songs 30", ["list of, songs 30", "a music app"])


@pytest.fixture(name="image_folder")
def fixture_image_folder(tmp_path, rng):
    lines = [
        {"image": "scans/a.png", "targets": "seven", "header": "How many?"},
        {"image": "b.png", "targets": "two"},
    ]
    for line in lines:
        save_image(tmp_path / line["image"], rng)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_an_image_folder_has_a_row_for_each_line(image_folder):
    assert read("image_folder", image_folder, "train") == [
        ("scans/a.png", "How many?", "seven", ["seven"]),
        ("b.png", "", "two", ["two"]),
    ]
    with pytest.raises(FileNotFoundError, match=r"validation\.jsonl"):
        read("image_folder", image_folder, "validation")
    with open(image_folder / "train.jsonl", "a") as f:
        f.write('{"image": "b.png"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:3: the field 'targets' is missing"):
        read("image_folder", image_folder, "train")


def test_tasks_read_the_images_with_their_questions_and_compute_the_metric(docvqa):
    name = vision.task("docvqa", "bytes", str(docvqa), patch_size=8)
    assert vision.task("docvqa", "bytes", str(docvqa), patch_size=8) == name
    task = seqio.get_mixture_or_task(name)
    (example,) = task.get_dataset(
        {"inputs": 60, "targets": 16}, "validation", shuffle=False
    ).as_numpy_iterator()
    path = str(docvqa / "val" / "documents" / "page_1.png")
    image = images.read_image(path, "What is the date?")
    np.testing.assert_allclose(example["inputs"], images.patches(image, 60, 8), atol=1e-5)
    target = task.postprocess_fn("1/8/93", example=example, is_target=True)
    assert target == ["1/8/93", "January 8, 93", "1/8/93"]
    assert task.metric_fns[0]([target], [task.postprocess_fn(" 1/8/92")]) == {
        "anls": pytest.approx(100 * 5 / 6)
    }


@pytest.mark.parametrize("name", ["ocr_vqa", "screen2words"])
def test_the_other_tasks_give_patches_and_targets(name, request):
    folder = request.getfixturevalue(name)
    task = vision.task(name, "bytes", str(folder))
    examples = seqio_examples(
        task,
        "train",
        feature_lengths={"inputs": 20, "targets": 20},
        seed=0,
        shuffle=False,
        num_epochs=1,
    )
    vocabulary = ByteVocabulary()
    for example, row in zip(examples, read(name, folder, "train"), strict=True):
        assert example["targets"].tolist() == [*vocabulary.encode(row[2]), 1]
        assert example["inputs"].shape[1] == 770 and len(example["inputs"]) <= 20


def test_screens_are_judged_by_cider_and_by_rouge(screen2words):
    task = seqio.get_mixture_or_task(vision.task("screen2words", "bytes", str(screen2words)))
    targets, predictions = [["a list"], ["the login"]], ["a list", "a page"]
    found = {k: v for metric in task.metric_fns for k, v in metric(targets, predictions).items()}
    assert found.keys() == {"cider", "rouge1", "rouge2", "rougeLsum"}
    assert 0 < found["cider"] < 1000


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match=r"no image task 'chartqa', only .*'docvqa'"):
        vision.task("chartqa", "bytes", "x")


def edit_ocr_vqa(folder, **changes):
    records = json.loads((folder / "dataset.json").read_text())
    records["076118320"] |= changes
    (folder / "dataset.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"split": None}, "dataset.json: '076118320': 'split' must be a int, not None"),
        ({"imageURL": 3}, "'imageURL' must be a str, not 3"),
        ({"answers": ["x"]}, "2 questions and 1 answers"),
        ({"answers": [1, 2]}, "'answers' must be a list of texts"),
        ({"questions": []}, "'questions' must be a list of texts"),
    ],
)
def test_records_of_ocr_vqa_that_are_not_as_published_are_named(ocr_vqa, changes, text):
    edit_ocr_vqa(ocr_vqa, **changes)
    with pytest.raises(ValueError, match=text):
        vision.read_ocr_vqa(str(ocr_vqa), "train")


def test_files_that_are_not_as_published_are_named(ocr_vqa):
    edit_ocr_vqa(ocr_vqa, split=7)
    edit = (ocr_vqa / "dataset.json").read_text().replace('"split": 2', '"split": 1')
    (ocr_vqa / "dataset.json").write_text(edit)
    with pytest.raises(ValueError, match="no examples of this split"):
        vision.read_ocr_vqa(str(ocr_vqa), "validation")
    (ocr_vqa / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json: not JSON"):
        vision.read_ocr_vqa(str(ocr_vqa), "train")
    with pytest.raises(FileNotFoundError, match=r"train_v1\.0\.json"):
        vision.read_docvqa(str(ocr_vqa), "train")


def test_screens_without_a_summary_are_named(screen2words):
    (screen2words / "split" / "dev_screens.txt").write_text("20\n99\n")
    with pytest.raises(ValueError, match=r"dev_screens.txt: .*no summary of the screen '99'"):
        vision.read_screen2words(str(screen2words), "validation")
    (screen2words / "screen_summaries.csv").write_text("screenId,summary\n11,\n")
    with pytest.raises(ValueError, match=r"csv:2: no 'screenId' or 'summary'"):
        vision.read_screen2words(str(screen2words), "train")


# --- Metrics. ---


def distance(first, second):
    """Levenshtein's distance, by its definition."""
    if not first or not second:
        return len(first) + len(second)
    return min(
        distance(first[1:], second) + 1,
        distance(first, second[1:]) + 1,
        distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@settings(max_examples=60)
@given(st.text("ab", max_size=5), st.text("ab", max_size=5))
def test_levenshtein_is_the_fewest_edits(first, second):
    assert metrics.levenshtein(first, second) == distance(first, second)


@pytest.mark.parametrize(
    ("answers", "prediction", "expected"),
    [
        (["Paris"], "paris", 1.0),
        (["Paris", "Lutetia"], "lutetla", 6 / 7),
        (["abcd"], "abxy", 0),  # 1 - NL only where NL < 1 / 2
        (["abcd"], "axyz", 0.0),  # below one half
        (["New  York"], "new york ", 1.0),
        (["1"], "", 0.0),
        ([""], "", 1.0),
    ],
)
def test_anls_of_one_question(answers, prediction, expected):
    assert metrics.anls([answers], [prediction]) == {"anls": pytest.approx(100 * expected)}


def test_anls_is_the_mean_over_the_questions():
    assert metrics.anls([["a"], ["b"]], ["a", "x"]) == {"anls": 50}


@given(st.lists(st.tuples(st.lists(ALPHABET, min_size=1, max_size=3), ALPHABET), min_size=1))
@settings(max_examples=30)
def test_anls_lies_between_exact_match_and_one_hundred(questions):
    targets, predictions = zip(*questions, strict=True)
    exact = np.mean([p in answers for answers, p in questions])
    assert 100 * exact - 1e-6 <= metrics.anls(targets, predictions)["anls"] <= 100 + 1e-6


def test_rouge_of_any_takes_the_closest_summary():
    targets = [["a list of songs", "the settings"], ["one two"]]
    found = metrics.rouge_of_any(targets, ["the settings", "three"])
    assert found == {"rouge1": 50, "rouge2": 50, "rougeLsum": 50}


@pytest.mark.parametrize("metric", [metrics.anls, metrics.rouge_of_any])
def test_targets_and_predictions_must_fit(metric):
    with pytest.raises(ValueError, match="1 targets and 2 predictions"):
        metric([["a"]], ["a", "b"])
