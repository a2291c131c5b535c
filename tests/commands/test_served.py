"""What is beside the programs of `coda export`: a vocabulary as ours, and all that it needs."""

import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys

from command_line import coda
import numpy as np
import pytest
from tokenizer_folders import FOLDER, NAMES, lines

from coda_jax import bundled
from coda_jax.commands import served
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.models import FAMILIES

INPUTS = FAMILIES["t5"].inputs.served
PATHS = {"bytes": "bytes", "spiece": bundled.VOCABULARY, **{x: FOLDER / x for x in NAMES[1:]}}


def copied(path, folder):
    """(vocabulary, encode and decode of vocabulary.py beside its copy)."""
    vocabulary = load_vocabulary(path)
    said = served.write_loader(folder, INPUTS, vocabulary)
    return vocabulary, *runpy.run_path(str(folder / "vocabulary.py"))["load"](folder, said)


@pytest.mark.parametrize("name", PATHS)
def test_the_copied_vocabulary_has_the_same_ids_and_texts(name, tmp_path):
    ours, encode, decode = copied(PATHS[name], tmp_path)
    rng = np.random.default_rng(0)
    glued = getattr(ours, "glued_sentinel", "$^")  # gets a space from us alone
    for text in (text for text in lines(200) if not re.search(glued, text)):
        ids = ours.encode(text)
        assert encode(text) == ids
        for some in (ids, rng.integers(0, ours.vocab_size + 9, 6).tolist()):
            before = [*itertools.takewhile(lambda i: i != ours.eos_id, some)]
            assert decode(before) == ours.decode(some)


def test_a_vocabulary_of_vocab_json_is_not_copied_which_is_said(tmp_path, capsys):
    assert served.write_loader(tmp_path, INPUTS, load_vocabulary(FOLDER / NAMES[0])) is None
    assert "no load.py in the folder, as there is vocab.json, merges.txt" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def text_lines(folder):
    return ["module: def is_finite(self, a): return a.is_finite()", "module: def dump(obj): pass"]


def image_lines(folder):
    from PIL import Image, ImageDraw

    for number in range(2):
        image = Image.new("RGB", (512, 128), "white")
        ImageDraw.Draw(image).text((60, 40), f"4{number}", fill="black", font_size=28)
        image.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(2)]


def sound_lines(folder):
    import soundfile

    time = np.arange(32000) / 16000
    for number, hertz in enumerate((300, 700)):
        sound = 0.3 * np.sin(2 * np.pi * hertz * time) * (np.sin(9 * time) > 0)
        soundfile.write(folder / f"{number}.wav", sound + 0.01 * np.sin(5000 * time), 16000)
    return [str(folder / f"{number}.wav") for number in range(2)]


KINDS = {  # a bundled checkpoint, the lines, the longest input
    "text": ("CODA", text_lines, 64),
    "images": ("CODA_IMAGES", image_lines, 256),
    "speech": ("CODA_SPEECH", sound_lines, 128),
}


@pytest.mark.all  # it needs the network and minutes
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_environment_with_what_the_modules_name_answers_as_coda_predict(kind, tmp_path):
    name, make_lines, longest = KINDS[kind]
    checkpoint = getattr(bundled, name)
    given = {"INITIAL_CHECKPOINT_PATH": checkpoint, "INITIAL_ADAPTER_PATH": checkpoint / "adapter"}
    given |= {"Decoding.max_input_length": longest, "Decoding.batch_size": 2}
    if kind != "text":
        given["VOCABULARY"] = "bytes"
    if kind != "speech":  # whose outputs are no longer than its inputs
        given |= {"Decoding.max_decode_length": 12}
    (tmp_path / "in.txt").write_text("\n".join(make_lines(tmp_path)) + "\n")
    files = {"INPUT": tmp_path / "in.txt", "OUTPUT": tmp_path / "out.jsonl"}
    coda("predict", ["runs/predict.gin"], given | files)
    coda("export", ["runs/export.gin"], given | {"OUTPUT": tmp_path / "served"})
    modules = "".join(path.read_text() for path in (tmp_path / "served").glob("*.py"))
    named = shlex.split(" ".join(re.findall(r"^ *pip install (.*)$", modules, re.MULTILINE)))
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *named], check=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    found = subprocess.run(
        [python, tmp_path / "served" / "load.py"],
        input=(tmp_path / "in.txt").read_bytes(),
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=variables,
        check=True,
    )
    assert found.stdout == (tmp_path / "out.jsonl").read_bytes()
