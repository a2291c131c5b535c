"""`coda predict` with an adapter for each line."""

import json

from helpers import adapted_params, config, random_params
import numpy as np
import pytest

from coda_jax.checkpoints import load_adapter, load_hf, save_adapter, save_hf
from coda_jax.commands.loading import load_model
from coda_jax.commands.many_adapters import find_adapters, with_adapters
from coda_jax.commands.predict import predict
from coda_jax.inference import Decoding

CONFIG = config({"reduction": 2.0}, vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
LINES = [("fade", "b"), ("a longer input", "a"), ("b", "a"), ("fade", "a")]
DECODING = Decoding(max_decode_length=6, batch_size=2)


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    """A base, adapters of it in "adapters", one of another base, and lines that ask for two."""
    folder = tmp_path_factory.mktemp("served")
    base = random_params(CONFIG.dense())
    kernel = np.array(base["decoder"]["logits_dense"]["kernel"])
    kernel[:, [*range(100), *range(126, 384)]] *= 0.01  # it writes letters
    base["decoder"]["logits_dense"]["kernel"] = kernel * 3
    save_hf(folder / "base", CONFIG.dense(), base)
    for seed, name in enumerate("ab"):
        adapted = adapted_params(CONFIG, base, seed=seed + 1)
        save_adapter(folder / "adapters" / name, CONFIG, adapted)
    other = adapted_params(CONFIG, random_params(CONFIG.dense(), seed=9))
    save_adapter(folder / "other", CONFIG, other)
    lines = [json.dumps({"inputs": text, "adapter": name}) for text, name in LINES]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def answers(folder, adapters, adapter=None, lines="in.jsonl"):
    """The lines that `coda predict` writes."""
    model = load_model(str(folder / "base"), adapter_checkpoint=adapter and str(adapter))
    output = folder / "out.jsonl"
    predict(with_adapters(model, adapters), str(folder / lines), str(output), DECODING, "bytes")
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_each_line_is_answered_with_its_adapter(folder):
    found = answers(folder, str(folder / "adapters"))
    assert [(line["inputs"], line["adapter"]) for line in found] == LINES
    lines = [json.dumps({"inputs": text}) for text, _ in LINES]
    (folder / "alone.jsonl").write_text("\n".join(lines))
    alone = answers(folder, None, folder / "adapters/a", "alone.jsonl")
    for line, expected in zip(found, alone, strict=True):
        same = line["prediction"] == expected["prediction"]
        assert same == (line["adapter"] == "a")


@pytest.mark.all
def test_a_stream_has_the_adapter_of_its_line(folder, capsys):
    found = answers(folder, str(folder / "adapters"))
    given = {name: str(folder / "adapters" / name) for name in "ab"}
    model = with_adapters(load_model(str(folder / "base")), given)
    predict(model, str(folder / "in.jsonl"), "-", DECODING, "bytes", stream=True)
    assert capsys.readouterr().out.splitlines() == [line["prediction"] for line in found]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"adapter": "c"}, r"bad\.jsonl:2: no adapter is called 'c'; there are a, b$"),
        ({"adapter": 3}, r"bad\.jsonl:2: no adapter is called 3; there are a, b$"),
        ({}, r"bad\.jsonl:2: the field 'adapter' is missing"),
    ],
)
def test_a_line_with_no_adapter_or_an_unknown_one_is_named(folder, line, named):
    lines = [{"inputs": "x", "adapter": "a"}, {"inputs": "y", **line}]
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=named):
        answers(folder, str(folder / "adapters"), lines="bad.jsonl")


def test_a_line_that_names_an_adapter_where_there_are_none_is_refused(folder):
    with pytest.raises(ValueError, match=r"in\.jsonl:1: the field 'adapter' chooses from ADAPTERS"):
        answers(folder, None)


def test_adapters_that_are_none_or_do_not_fit_are_refused(folder):
    both = {"a": str(folder / "adapters/a"), "other": str(folder / "other")}
    (folder / "one.jsonl").write_text('{"inputs": "x", "adapter": "a"}')
    with pytest.raises(ValueError, match="other belongs to another base"):
        answers(folder, both, lines="one.jsonl")
    with pytest.raises(ValueError, match="belong to a base alone: no INITIAL_ADAPTER_PATH"):
        answers(folder, str(folder / "adapters"), folder / "adapters/a")
    (folder / "in.txt").write_text("x\n")
    with pytest.raises(ValueError, match=r"in\.txt:1: the field 'adapter' is missing"):
        answers(folder, str(folder / "adapters"), lines="in.txt")


def test_inputs_are_cut_where_those_of_no_adapter_were(folder, tmp_path):
    """The longest that one of them was trained with."""
    config, params = load_hf(folder / "base")
    for number, name in enumerate("ab"):
        adapted = load_adapter(folder / "adapters" / name, config, params)
        lengths = {"inputs": 9 - number, "targets": 6 + number}
        save_adapter(tmp_path / name, *adapted, lengths=lengths)
    model = with_adapters(load_model(str(folder / "base")), str(tmp_path))
    assert model.lengths == {"inputs": 9, "targets": 7}


@pytest.mark.parametrize("given", [{}, 3, "", {"a": None}, {"": "x"}, {"a": 3}])
def test_what_says_no_adapters_is_refused(given):
    with pytest.raises(ValueError, match="ADAPTERS"):
        find_adapters(given)


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_adapters(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="ADAPTERS"):
        find_adapters(str(tmp_path))
