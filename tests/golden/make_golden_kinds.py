"""Makes a tiny random checkpoint of each kind that people have of the T5 family.

Run `python tests/golden/make_golden_kinds.py` from the repository root, with torch, transformers 5
and flax installed, to make the files again. Each folder of tests/golden/kinds has a config.json as
the kind's published ones are, its weights in the format in which the kind is published, and what
transformers computes with them: logits and greedy outputs, or the outputs of an encoder alone.
"""

import itertools
import json
from pathlib import Path
import shutil

from flax import serialization
from make_golden import random_inputs
import ml_dtypes
import numpy as np
from safetensors.torch import save_file
import torch
import transformers

FOLDER = Path(__file__).parent / "kinds"
STEPS = 12  # of the greedy outputs
SIZES = {
    "d_model": 12, "d_kv": 6, "d_ff": 20, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 1,
    "vocab_size": 48, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
    "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "pad_token_id": 0, "relative_attention_num_buckets": 32, "use_cache": True,
    "relative_attention_max_distance": 128,
}  # fmt: skip
T5 = {**SIZES, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
      "transformers_version": "4.23.1"}  # fmt: skip
V1_1 = {**T5, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True,
        "tie_word_embeddings": False, "output_past": True}  # fmt: skip
UMT5 = {**V1_1, "model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"],
        "scalable_attention": True, "tokenizer_class": "T5Tokenizer"}  # fmt: skip
CHRONOS = {"tokenizer_class": "MeanScaleUniformBins", "n_tokens": 48, "prediction_length": 64}


def without(raw: dict, *names: str) -> dict:
    """The fields but some."""
    return {name: value for name, value in raw.items() if name not in names}


KINDS = {  # name: (fields of config.json, format and dtype of the weights)
    "v1_1_msgpack": (V1_1, "msgpack", "float32"),
    "v1_1_bin_shards": (V1_1, "bin shards", "float32"),
    "v1_0_legacy": (without(T5, "architectures"), "legacy", "float32"),
    "byt5_msgpack_shards": (
        V1_1 | {"tokenizer_class": "ByT5Tokenizer"}, "msgpack shards", "float32"
    ),
    "mt5_bfloat16": (without(V1_1 | {"model_type": "mt5"}, "architectures"), "bin", "bfloat16"),
    "umt5_bin": (without(UMT5, "model_type", "feed_forward_proj"), "bin", "float32"),
    "pile_t5": (
        UMT5 | {"eos_token_id": 2, "tokenizer_class": "LlamaTokenizerFast"},
        "safetensors",
        "float32",
    ),
    "madlad_400": (
        V1_1 | {"pad_token_id": 1, "eos_token_id": 2, "d_kv": 10}, "safetensors", "float32"
    ),
    "codet5": (
        T5 | {"bos_token_id": 1, "eos_token_id": 2, "feed_forward_proj": "relu", "n_positions": 512,
              "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        "bin",
        "float32",
    ),
    "flan_ul2": (
        T5 | {"feed_forward_proj": "gated-silu", "dense_act_fn": "silu", "is_gated_act": True},
        "safetensors",
        "bfloat16",
    ),
    "chronos_t5": (
        T5 | {"feed_forward_proj": "relu", "chronos_config": CHRONOS}, "safetensors", "float32"
    ),
    "t5_encoder": (V1_1 | {"architectures": ["T5EncoderModel"]}, "safetensors", "bfloat16"),
    "umt5_encoder": (UMT5 | {"architectures": ["UMT5EncoderModel"]}, "safetensors", "float32"),
    "prot_t5": (
        T5 | {"architectures": ["T5EncoderModel"], "feed_forward_proj": "relu"}, "bin", "float16"
    ),
}  # fmt: skip


def is_encoder(raw: dict) -> bool:
    """Whether the kind has no decoder."""
    return "EncoderModel" in "".join(raw.get("architectures", ()))


def reference(raw: dict, seed: int):
    """transformers' model with random weights, of scales that make every part of it matter."""
    kind = raw.get("model_type", "umt5").upper()
    known = getattr(transformers, f"{kind}Config")(**without(raw, "architectures", "model_type"))
    suffix = "EncoderModel" if is_encoder(raw) else "ForConditionalGeneration"
    model = getattr(transformers, kind + suffix)(known).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layer_norm" in name:
                value = rng.uniform(0.5, 1.5, tensor.shape)
            elif "relative_attention_bias" in name or name == "shared.weight":
                value = rng.normal(size=tensor.shape)
            else:
                value = rng.normal(size=tensor.shape) * 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(torch.tensor(value))
            if name == "shared.weight":
                tensor[raw["eos_token_id"]] *= 2  # so that answers end
        if "lm_head.weight" in model.state_dict() and not raw.get("tie_word_embeddings", True):
            value = torch.tensor(rng.normal(size=model.lm_head.weight.shape) * 0.5)
            value[raw["eos_token_id"]] *= 3
            model.lm_head.weight = torch.nn.Parameter(value.float())
    return model


def stored(model, dtype: str) -> dict[str, torch.Tensor]:
    """The weights as published: copies of the embedding are there once."""
    weights = {name: leaf.to(getattr(torch, dtype)) for name, leaf in model.state_dict().items()}
    if torch.equal(weights.get("lm_head.weight", torch.ones(1)), weights["shared.weight"]):
        del weights["lm_head.weight"]
    return {name: leaf for name, leaf in weights.items() if "embed_tokens" not in name}


def as_flax(weights: dict[str, torch.Tensor]) -> dict:
    """The weights as transformers' Flax models save them: kernels [in, out], nested names."""
    tree: dict = {}
    for name, tensor in weights.items():
        leaf = tensor.float().numpy()
        *path, last = name.split(".")
        if name == "shared.weight" or "relative_attention_bias" in name:
            last = "embedding"
        elif "layer_norm" not in name:
            last, leaf = "kernel", np.ascontiguousarray(leaf.T)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf.astype(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else leaf
    return tree


def flax_names(tree: dict, prefix: str = "") -> list[str]:
    """The paths of a tree's leaves, as an index names them."""
    return [
        path
        for key, value in tree.items()
        for path in (
            flax_names(value, f"{prefix}{key}/") if isinstance(value, dict) else [prefix + key]
        )
    ]


def write_shards(folder: Path, parts: list, stem: str, suffix: str, write, names) -> None:
    """Writes the parts of a checkpoint and their index."""
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}{suffix}"
        write(part, folder / file)
        index |= dict.fromkeys(names(part), file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index}, indent=2)
    (folder / f"{stem}{suffix}.index.json").write_text(text)


def write_weights(folder: Path, weights: dict[str, torch.Tensor], layout: str) -> None:
    """Writes the weights in one of the formats."""

    def write_flax(tree, path):
        path.write_bytes(serialization.msgpack_serialize(tree))

    half = len(weights) // 2
    halves = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    if layout == "safetensors":
        contiguous = {name: leaf.contiguous() for name, leaf in weights.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "msgpack":
        write_flax(as_flax(weights), folder / "flax_model.msgpack")
    elif layout == "msgpack shards":
        parts = [as_flax(part) for part in halves]
        write_shards(folder, parts, "flax_model", ".msgpack", write_flax, flax_names)
    elif layout == "bin shards":
        write_shards(folder, halves, "pytorch_model", ".bin", torch.save, list)
    else:
        zipped = layout != "legacy"
        file = folder / "pytorch_model.bin"
        torch.save(weights, file, _use_new_zipfile_serialization=zipped)


def expected(model, raw: dict, dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Inputs, and what the model gives for them with the weights as they are stored."""
    rounded = {n: x.to(getattr(torch, dtype)).float() for n, x in model.state_dict().items()}
    model.load_state_dict(rounded)
    pad = raw["pad_token_id"]
    inputs = random_inputs(raw["vocab_size"] - 3, seed)
    mask = inputs["encoder"] > 0
    tokens = np.where(mask, inputs["encoder"] + 2, pad)
    given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        if is_encoder(raw):
            return {"encoder": tokens, "outputs": model(**given).last_hidden_state.numpy()}
        targets = np.where(inputs["decoder_targets"] > 0, inputs["decoder_targets"] + 2, pad)
        shifted = np.concatenate([np.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1)
        logits = model(**given, decoder_input_ids=torch.tensor(shifted).long()).logits.numpy()
        greedy = model.generate(**given, max_new_tokens=STEPS, num_beams=1, do_sample=False)[:, 1:]
    greedy = np.pad(greedy.numpy(), ((0, 0), (0, STEPS - greedy.shape[1])), constant_values=pad)
    names = ("encoder", "decoder_inputs", "decoder_targets", "logits", "greedy")
    return dict(zip(names, (tokens, shifted, targets, logits, greedy), strict=True))


def ends(found: dict[str, np.ndarray], raw: dict) -> bool:
    """Whether some answer ends, and some answer does not end at once."""
    if is_encoder(raw):
        return True
    return (found["greedy"] == raw["eos_token_id"]).any() and (
        found["greedy"][:, 1:] != raw["pad_token_id"]
    ).any()


def main() -> None:
    """Makes all golden files."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for number, (name, (raw, layout, dtype)) in enumerate(KINDS.items()):
        for seed in itertools.count(100 * number):
            model = reference(raw, seed)
            weights = stored(model, dtype)
            found = expected(model, raw, dtype, seed)
            if ends(found, raw):
                break
        folder = FOLDER / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        write_weights(folder, weights, layout)
        np.savez_compressed(folder / "expected.npz", **found)


if __name__ == "__main__":
    main()
