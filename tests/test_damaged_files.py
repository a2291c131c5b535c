"""Files that are cut, changed or mixed up, by kind: refused by name, or read as what they say.

Where a file has a checksum, what is read is what was written.
"""

import functools
import itertools
import json
import pathlib
import shutil
import tempfile
import time

from helpers import GOLDEN, TINY, adapted_params, config, random_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from tokenizer_folders import FOLDER as TOKENIZERS

from coda_jax import bundled, files
from coda_jax.checkpoints import adapter, config_json, load_hf, save_hf
from coda_jax.checkpoints import huggingface as hf
from coda_jax.checkpoints.generation_config import read_generation_config
from coda_jax.checkpoints.huggingface import load_hf_config
from coda_jax.commands.sources import _config_of
from coda_jax.data import cache, labels, rows
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.tasks import tables
from coda_jax.training.run_identity import check_run

TEXT = "def f(<extra_id_0>): ü 日本 🙂 x"
CODA = config({"reduction": 2.0})
RECORDS = [
    {"inputs": "a é\n🙂", "targets": "b", "label": "yes"},
    {"inputs": "", "targets": "日本", "label": "no"},
]
RUN = {
    "format_version": 3,
    "config": config_json.to_json(CODA),
    "base": {"encoder/encoder_norm/scale": "0" * 64},
    "options": {"total_steps": 6, "seed": 0},
    "learning_rate": {"name": "constant", "value": 0.01},
}
ENTRIES = [{"inputs": np.arange(2, 9), "targets": np.array([5, 1])}] * 3
METADATA = {"vocabulary": "bytes", "vocab_size": 384, "eos_id": 1, "feature_lengths": {"inputs": 9}}


def vocabulary(folder):
    found = load_vocabulary(folder)
    ids = found.encode(TEXT)
    return ids, found.decode(ids), found.eos_id, found.vocab_size


def values(loaded):
    """What compares a config and parameters."""
    config, params = loaded
    return config, adapter.fingerprints(params)


def cached(folder):
    examples, metadata = cache.read_cache(folder / "cache.npz")
    return [{key: x.tolist() for key, x in example.items()} for example in examples], metadata


@functools.cache
def base():
    return random_params(TINY)


def go_on(folder):
    """As a run does that has saved something."""
    (folder / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
    check_run(folder, RUN)


def write_adapter(folder):
    adapter.save_adapter(folder, CODA, adapted_params(CODA, base(), seed=1))


def write_shards(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "MAX_SHARD_BYTES", 30_000)
        save_hf(folder, TINY, base())


def write_jsonl(folder):
    text = "".join(json.dumps(x, ensure_ascii=i == 0) + "\n" for i, x in enumerate(RECORDS))
    (folder / "a.jsonl").write_text(text, encoding="utf-8")


def read(path):
    return list(itertools.chain.from_iterable(rows.read_requests(path, "inputs")))


def copied(source, *names):
    def write(folder):
        for name in names or [path.name for path in source.iterdir()]:
            shutil.copy(source / name, folder)

    return write


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def transformers_config(name):
    return copied(GOLDEN / name, "config.json"), load_hf_config, False


def tokenizer(name):
    return copied(TOKENIZERS / name), vocabulary, False


GENERATION = b'{"num_beams": 4, "length_penalty": 0.6, "max_length": 20, "forced_bos_token_id": 3}'
SETTINGS = {"eos_token": "</s>", "extra_ids": 100, "additional_special_tokens": ["<extra_id_1>"]}
KINDS = {  # file: (what writes its folder, what reads it, whether there is a checksum)
    "a.jsonl": (write_jsonl, lambda x: read(x / "a.jsonl"), False),
    "a.jsonl, labels": (write_jsonl, lambda x: labels.read_labels(x / "a.jsonl"), False),
    "a.txt": (written("a.txt", TEXT.encode() + b"\r\na\rb\n"),
              lambda x: read(x / "a.txt"), False),
    "a.csv": (written("a.csv", b'inputs,id\n"a ""b""\nc",\xc3\xbc\nd,e\n'),
              lambda x: read(x / "a.csv"), False),
    "a.tsv": (written("a.tsv", b"path\tsentence\na.wav\t\xc3\xbc\n"),
              lambda x: list(tables.read_tsv(str(x / "a.tsv"))), False),
    "a.json": (written("a.json", json.dumps({"data": RECORDS}).encode()),
               lambda x: tables.read_json(str(x / "a.json")), False),
    "spiece.model": (copied(bundled.VOCABULARY, "spiece.model"), vocabulary, False),
    "tokenizer.json, unigram": tokenizer("unigram_5"),
    "tokenizer_config.json, unigram": tokenizer("unigram_5"),
    "vocab.json, byte_bpe": tokenizer("byte_bpe"),
    "merges.txt, byte_bpe": tokenizer("byte_bpe"),
    "special_tokens_map.json, byte_bpe": tokenizer("byte_bpe"),
    "tokenizer_config.json, spiece": (
        lambda x: (copied(bundled.VOCABULARY, "spiece.model")(x),
                   files.write_json(x / "tokenizer_config.json", SETTINGS)), vocabulary, False),
    **{f"config.json, {name}": transformers_config(name)
       for name in ("v1_1", "mt5", "pix2struct", "w2v_bert")},
    "generation_config.json": (written("generation_config.json", GENERATION),
                               lambda x: read_generation_config(x, TINY), False),
    "adapter.json": (write_adapter,
                     lambda x: values(adapter.load_adapter(x, TINY, base())), True),
    "adapter.safetensors": (write_adapter,
                            lambda x: values(adapter.load_adapter(x, TINY, base())), True),
    "model.safetensors": (lambda x: save_hf(x, TINY, base()), lambda x: values(load_hf(x)), True),
    "model.safetensors.index.json": (write_shards, lambda x: values(load_hf(x)), True),
    "run.json": (
        lambda x: files.write_json(x / "run.json", RUN),
        lambda x: _config_of(files.read_json(x / "run.json"), x / "run.json"), False),
    "run.json, that goes on": (lambda x: files.write_json(x / "run.json", RUN), go_on, False),
    "cache.npz": (lambda x: cache.write_cache(x / "cache.npz", ENTRIES, METADATA), cached, True),
}  # fmt: skip


@functools.cache
def sound(kind):
    """({name: content} of a kind's folder, what is read of it)."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write, read, _ = KINDS[kind]
        write(folder)
        found = {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}
        return found, read(folder)


PIECES = st.sampled_from(
    [b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\x00", b'"', b"[" * 200, b'{"a":' * 2000, b"\\ud83d",
     b"-1", b"1e999", b"NaN", b"null", b"99999999999", b"true", b"[]", b"{}", b'"x"',
     b"\xed\xa0\xbd"]
)  # fmt: skip


@st.composite
def damages(draw, content):
    """The content cut, with other bytes, with some taken out, put in, or twice."""
    size = len(content)
    place = draw(st.integers(0, size - 1))
    end = min(size, place + draw(st.integers(1, 40)))
    change = draw(
        st.sampled_from(["cut", "flip", "flip", "flip", "take", "put", "replace", "twice"])
    )
    if change == "cut":
        return content[:place]
    if change == "flip":
        changed = bytearray(content)
        for at in {place, *draw(st.lists(st.integers(0, size - 1), max_size=2))}:
            changed[at] ^= draw(st.integers(1, 255))
        return bytes(changed)
    middle = {"take": b"", "twice": content[place:end] * 2}.get(change)
    if middle is None:
        middle = draw(PIECES | st.binary(max_size=4))
    return content[:place] + middle + content[end if change != "put" else place :]


JSON = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2**31, 2**63, 1e308, -0.5, "", "x", [], {}]),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from("ab"), x, max_size=2),
    max_leaves=3,
)


@st.composite
def other_values(draw, content):
    """A JSON file with another value, or without one, at some place."""
    value = json.loads(content)
    path, inner = [], value
    while isinstance(inner, dict | list) and inner and (not path or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        path.append((inner, key))
        inner = inner[key]
    if path and draw(st.integers(0, 4)):
        path[-1][0][path[-1][1]] = draw(JSON)
    elif path:
        del path[-1][0][path[-1][1]]
    return json.dumps(value).encode()


def check(kind, data):
    """A damaged file is refused by name and at once, or is read."""
    contents, expected = sound(kind)
    name = kind.split(",")[0]
    changed = damages(contents[name])
    if name.endswith(".json"):
        changed |= other_values(contents[name])
    content = data.draw(changed)
    _, read, has_checksum = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for other, unchanged in contents.items():
            (folder / other).write_bytes(content if other == name else unchanged)
        start = time.perf_counter()
        try:
            found = read(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), error
        else:
            assert not has_checksum or found == expected
        assert time.perf_counter() - start < 10


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_file_is_refused_by_name_or_read(kind, data):
    check(kind, data)


@pytest.mark.all
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_thousand_damages_of_each_kind(kind, data):
    check(kind, data)


@pytest.mark.parametrize("kind", ["cache.npz", "adapter.safetensors", "model.safetensors"])
def test_every_byte_of_a_sealed_file_counts(kind):
    """Or changes nothing that is read: the names of the checksum itself, and of the layout."""
    contents, expected = sound(kind)
    _, read, _ = KINDS[kind]
    size, read_all_the_same = len(contents[kind]), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        for place in range(0, size, max(1, size // 150)):
            changed = bytearray(contents[kind])
            changed[place] ^= 1 << place % 8
            (folder / kind).write_bytes(changed)
            try:
                found = read(folder)
            except ValueError as error:
                assert str(folder) in str(error)
            else:
                assert found == expected
                read_all_the_same += 1
    assert read_all_the_same <= (0 if kind == "cache.npz" else 5)
