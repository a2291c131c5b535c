"""The README.md beside an adapter file."""

import json
import re

from command_line import coda
from helpers import TINY, adapted_params, config, random_params
import pytest

from coda_jax import checkpoints
from coda_jax.commands.convert import convert
from coda_jax.commands.model_card import CARD, made_by, write_card
from coda_jax.methods import Coda, Lora, ParallelAdapter

yaml = pytest.importorskip("yaml")


def header(text):
    """What the YAML of a card says."""
    _, found, _ = text.split("---\n", 2)
    return yaml.safe_load(found)


def test_a_card_says_what_the_adapter_is(tmp_path):
    model = TINY.replace(methods=(Coda(2.5), ParallelAdapter(4)))
    with made_by("coda train", "--gin_file=methods/coda.gin", "--gin.A=x y"):
        write_card(tmp_path, model, (50, 1000), base="flan-t5-base", task="mnli",
                   metrics={"loss": 0.25, "exact_match": 2 / 3})  # fmt: skip
    text = (tmp_path / CARD).read_text()
    assert header(text) == {
        "library_name": "coda_jax",
        "base_model": "flan-t5-base",
        "base_model_relation": "adapter",
        "tags": ["adapter", "t5", "coda", "parallel_adapter"],
        "metrics": ["exact_match", "loss"],
    }
    for line in (
        "# coda + parallel_adapter of flan-t5-base for mnli",
        "| base | `flan-t5-base` |",
        "| task | `mnli` |",
        "| parameters | 50 of 1,000 (5.00%) |",
        "| exact_match | 0.666667 |",
        "    coda train \\",
        "      '--gin.A=x y'",
        'config, params = coda_jax.load_hf("flan-t5-base")',
    ):
        assert line in text.splitlines(), line
    assert "**coda** `reduction=2.5` `epsilon=1.0`" in text


@pytest.mark.parametrize("base", ["../a: b", "/x/#1", 'say "t5"', "größe", "- x", "{x"])
def test_any_name_of_a_base_is_a_text_in_the_header(base, tmp_path):
    write_card(tmp_path, TINY.replace(methods=(Lora(2),)), (1, 2), base=base)
    assert header((tmp_path / CARD).read_text())["base_model"] == base


def test_what_is_not_known_is_left_out(tmp_path):
    write_card(tmp_path, TINY.replace(methods=(Lora(2),)), (1, 2))
    text = (tmp_path / CARD).read_text()
    assert header(text).keys() == {"library_name", "tags"}
    assert "# lora of a t5\n" in text
    assert "None" not in text and "command" not in text and "metric" not in text


@pytest.mark.all
def test_training_writes_the_card_with_its_command(tmp_path, monkeypatch):
    """What was typed, with relative names; the same text each time."""
    model = config(vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
    checkpoints.save_hf(tmp_path / "base", model, random_params(model))
    lines = [json.dumps({"inputs": word, "targets": word[0]}) for word in ("abc", "cde", "efg")]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    given = {
        "INITIAL_CHECKPOINT_PATH": "base",
        "TRAIN_FILE": "train.jsonl",
        "VALIDATION_FILE": "validation.jsonl",
        "VOCABULARY": "bytes",
        "BATCH_SIZE": 2,
        "TRAIN_STEPS": 1,
        "MODEL_DIR": "run",
    }
    coda("train", ["runs/finetune.gin", "methods/lora.gin", "tasks/jsonl.gin"], given)
    folder = tmp_path / "run/export/adapter"
    text = (folder / CARD).read_text()
    assert header(text)["base_model"] == "base"
    assert (
        set(header(text)["metrics"])
        == json.loads((tmp_path / "run/metrics.json").read_text()).keys()
    )
    command = text[text.index("    coda train") :]
    assert "--gin_file=methods/lora.gin" in command and "--gin.MODEL_DIR=run" in command
    assert str(tmp_path) not in text and not re.search(r"\b20\d\d\b", text)
    loaded = checkpoints.load_adapter(folder, *checkpoints.load_hf(tmp_path / "base"))
    assert loaded[0].methods == (Lora(8),)


def test_convert_writes_one_too(tmp_path):
    base_params = random_params(TINY)
    checkpoints.save_hf(tmp_path / "base", TINY, base_params)
    model = TINY.replace(methods=(Lora(2),))
    checkpoints.save_adapter(tmp_path / "old", model, adapted_params(model, base_params))
    assert not (tmp_path / "old" / CARD).exists()
    base = str(tmp_path / "base")
    convert(str(tmp_path / "old"), str(tmp_path / "new"), "adapter", base=base)
    assert header((tmp_path / "new" / CARD).read_text())["base_model"] == base
