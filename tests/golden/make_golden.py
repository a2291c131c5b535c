"""Makes the small random T5 checkpoints and the logits that transformers computes for them.

Run `python tests/golden/make_golden.py` from the repository root, with the `test` extra installed,
to make the files again. The checkpoints have the layouts of the published ones:
  v1_1   gated-gelu, untied (T5 v1.1, LM-adapted, flan-T5)
  v1_0   relu, tied, scaled logits (T5 1.0), with copies of the embedding as old files have them
  mt5    gated-gelu, untied, model_type mt5
  byt5   gated-gelu, untied, more encoder than decoder layers, its own sizes
"""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
import torch
import transformers

FOLDER = Path(__file__).parent
SIZES = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 2, "num_layers": 2, "vocab_size": 64}
V1_1 = {**SIZES, "model_type": "t5", "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False}  # fmt: skip
V1_0 = {**SIZES, "model_type": "t5", "n_positions": 512, "output_past": True}
CONFIGS = {
    "v1_1": {**V1_1, "is_gated_act": True, "dense_act_fn": "gelu_new"},
    "v1_0": {**V1_0, "vocab_size": 56},
    "mt5": {**V1_1, "model_type": "mt5", "tokenizer_class": "T5Tokenizer"},
    "byt5": {**V1_1, "d_model": 20, "d_kv": 6, "num_heads": 3, "num_layers": 3,
             "num_decoder_layers": 1, "relative_attention_num_buckets": 16,
             "relative_attention_max_distance": 20, "tokenizer_class": "ByT5Tokenizer"},
}  # fmt: skip
COMMON = {
    "architectures": ["T5ForConditionalGeneration"],
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "transformers_version": "4.16.0",
    "use_cache": True,
}


def random_weights(raw: dict, seed: int) -> dict[str, torch.Tensor]:
    """Returns random weights for a config, of scales that make every part of the model matter."""
    cls = getattr(transformers, {"t5": "T5", "mt5": "MT5"}[raw["model_type"]] + "Config")
    names = transformers.T5ForConditionalGeneration(cls(**raw)).state_dict()
    rng = np.random.default_rng(seed)
    weights = {}
    for name, tensor in names.items():
        if "layer_norm" in name:
            value = rng.uniform(0.5, 1.5, tensor.shape)
        elif "relative_attention_bias" in name or name == "shared.weight":
            value = rng.normal(size=tensor.shape)
        else:
            value = rng.normal(size=tensor.shape) * 0.8 * tensor.shape[-1] ** -0.5
        weights[name] = torch.tensor(value, dtype=torch.float32)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        del weights[name]
    if raw.get("tie_word_embeddings", True):
        del weights["lm_head.weight"]
    return weights


def write_checkpoint(folder: Path, raw: dict, weights: dict[str, torch.Tensor]) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps({**COMMON, **raw}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def random_inputs(vocab: int, seed: int, lengths=(33, 9, 20), targets=(7, 5, 6)) -> dict:
    """Returns a padded batch of encoder tokens and targets; 0 is padding."""
    rng = np.random.default_rng(seed)
    encoder = np.zeros((len(lengths), max(lengths)), np.int32)
    decoder = np.zeros((len(targets), max(targets)), np.int32)
    for row, (length, target) in enumerate(zip(lengths, targets, strict=True)):
        encoder[row, :length] = rng.integers(1, vocab, length)
        decoder[row, :target] = rng.integers(1, vocab, target)
    inputs = np.concatenate([np.zeros_like(decoder[:, :1]), decoder[:, :-1]], axis=1)
    return {"encoder": encoder, "decoder_inputs": inputs, "decoder_targets": decoder}


def reference_logits(folder: Path, inputs: dict) -> np.ndarray:
    """Returns the logits of transformers' T5 [B, T, V]; fails if a weight was not loaded."""
    mt5 = json.loads((folder / "config.json").read_text())["model_type"] == "mt5"
    cls = getattr(transformers, ("MT5" if mt5 else "T5") + "ForConditionalGeneration")
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        raise ValueError(f"{folder}: {problems}")
    return logits(model, inputs)


def logits(model: torch.nn.Module, inputs: dict) -> np.ndarray:
    """Returns the logits of a model of transformers [B, T, V]."""
    encoder = torch.tensor(inputs["encoder"], dtype=torch.long)
    with torch.no_grad():
        output = model.eval()(
            input_ids=encoder,
            attention_mask=(encoder > 0).long(),
            decoder_input_ids=torch.tensor(inputs["decoder_inputs"], dtype=torch.long),
        )
    return output.logits.float().numpy()


def main() -> None:
    """Makes all golden files."""
    for seed, (name, raw) in enumerate(CONFIGS.items()):
        folder = FOLDER / name
        weights = random_weights(raw, seed)
        if name == "v1_0":
            for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
                weights[copy] = weights["shared.weight"].clone()
            unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
            weights[unused] = torch.ones(32, raw["num_heads"])
        write_checkpoint(folder, raw, weights)
        inputs = random_inputs(raw["vocab_size"], seed)
        np.savez_compressed(
            folder / "logits.npz", logits=reference_logits(folder, inputs), **inputs
        )


if __name__ == "__main__":
    main()
