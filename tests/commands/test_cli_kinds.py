"""Kinds of folders from the command line: train, predict, and the adapter put onto its base."""

import json
import shutil

from command_line import coda
from flax import serialization
from helpers import GOLDEN, TINY, random_params
import numpy as np
import pytest
from safetensors.numpy import load_file
import sentencepiece
import torch_format

from coda_jax import checkpoints
from coda_jax.commands.loading import load_model
from coda_jax.data.vocabularies import find_fingerprint, load_vocabulary
from coda_jax.inference import Decoding, Predictor

WORDS = ("red", "green", "blue", "two words", "три", "def f(x): return x")
UMT5 = {"shared_relpos_bias": False}
KINDS = {  # name: (the config's changes, vocabulary, format of the weights)
    "v1_1": ({}, "unigram", "msgpack"),
    "flan_of_transformers_5": ({}, "unigram_5", "safetensors"),
    "flan_of_transformers_4": ({}, "unigram_4", "safetensors"),
    "umt5": (UMT5, "unigram", "bin"),
    "pile_t5": ({**UMT5, "eos_id": 2}, "llama_5", "bin"),
    "codet5": (
        {"eos_id": 2, "mlp_activations": ("relu",), "logits_via_embedding": True},
        "byte_bpe",
        "bin",
    ),
    "flan_ul2": ({"mlp_activations": ("silu", "linear")}, "unigram_4", "safetensors"),
    "madlad_400": ({"pad_id": 1, "eos_id": 2, "num_heads": 3}, "madlad", "safetensors"),
    "byt5": ({}, "bytes", "msgpack"),
}


def as_msgpack(folder, tensors):
    """The weights as transformers' Flax models save them."""
    tree = {}
    for name, leaf in tensors.items():
        *path, last = name.split(".")
        if name == "shared.weight" or "relative_attention_bias" in name:
            last = "embedding"
        elif "layer_norm" not in name:
            last, leaf = "kernel", np.ascontiguousarray(leaf.T)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))


def as_bin(folder, tensors):
    """The weights as `torch.save` writes them."""
    (folder / "pytorch_model.bin").write_bytes(torch_format.of_arrays(tensors))


def write_vocabulary(folder, name):
    """The files of a vocabulary; MADLAD-400 pads with <s>, its second token."""
    if name == "bytes":
        settings = {"tokenizer_class": "ByT5Tokenizer"}
    elif name == "madlad":
        settings = {"tokenizer_class": "T5Tokenizer", "pad_token": "<s>", "extra_ids": 0}
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(WORDS), model_prefix=str(folder / "spiece"), vocab_size=40,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    else:
        shutil.copytree(GOLDEN / "tokenizers" / name, folder, dirs_exist_ok=True)
        return
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(name="folder", params=KINDS)
def fixture_folder(request, tmp_path):
    """A folder of the kind with random weights."""
    changes, vocabulary, layout = KINDS[request.param]
    folder = tmp_path / "base"
    config = TINY.replace(vocab_size=400, **changes)
    checkpoints.save_hf(folder, config, random_params(config))
    if layout != "safetensors":
        tensors = load_file(folder / "model.safetensors")
        (as_msgpack if layout == "msgpack" else as_bin)(folder, tensors)
        (folder / "model.safetensors").unlink()
    write_vocabulary(folder, vocabulary)
    return folder


@pytest.mark.all
def test_a_folder_trains_answers_and_keeps_its_adapter(folder, tmp_path):
    data, texts = tmp_path / "train.jsonl", tmp_path / "in.txt"
    lines = [{"inputs": word, "targets": word[:3]} for word in WORDS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts.write_text("".join(f"{word}\n" for word in WORDS))
    given = {"INITIAL_CHECKPOINT_PATH": folder, "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 4}}
    run = {"TRAIN_FILE": data, "MODEL_DIR": tmp_path / "run", "TRAIN_STEPS": 5, "BATCH_SIZE": 4}
    run["LEAVE_OUT"] = True  # not every vocabulary has all of the characters
    files = ["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    coda("train", files, {**given, **run, "ParallelAdapter.bottleneck": 4, "REDUCTION": 2})
    adapter = tmp_path / "run" / "export" / "adapter"
    manifest = checkpoints.adapter.read_manifest(adapter)
    assert manifest["vocabulary"] == find_fingerprint(folder) or manifest["vocabulary"] == "bytes"

    asked = {"INITIAL_ADAPTER_PATH": adapter, "INPUT": texts, "OUTPUT": tmp_path / "out.jsonl"}
    asked |= {"Decoding.max_decode_length": 6, "BATCH_SIZE": 4}
    coda("predict", ["runs/predict.gin"], {"INITIAL_CHECKPOINT_PATH": folder, **asked})
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["inputs"] for answer in answers] == list(WORDS)

    model, vocabulary = (
        load_model(str(folder), adapter_checkpoint=str(adapter)),
        load_vocabulary(folder),
    )
    predictor = Predictor(model.config, model.params, Decoding(max_decode_length=6, batch_size=2))
    for answer in answers[:2]:
        ids = np.array([*vocabulary.encode(answer["inputs"]), vocabulary.eos_id])
        ((_, tokens),) = predictor([ids])
        assert vocabulary.decode(tokens.tolist()) == answer["prediction"]
