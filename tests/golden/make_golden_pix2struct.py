"""Makes a small random Pix2Struct checkpoint, its logits, and patches, all as transformers does.

Run `python tests/golden/make_golden_pix2struct.py` from the repository root, with the `test` extra
installed, to make the files again. The configurations other than `pix2struct` are for the test that
compares with transformers itself.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
import torch
import transformers
from transformers.models.pix2struct import image_processing_pil_pix2struct

FOLDER = Path(__file__).parent
TEXT = {"vocab_size": 64, "hidden_size": 24, "d_kv": 8, "d_ff": 40, "num_heads": 3, "num_layers": 2}
VISION = {"hidden_size": 24, "patch_embed_hidden_size": 12, "d_ff": 40, "d_kv": 8,
          "num_hidden_layers": 2, "num_attention_heads": 3, "seq_len": 20}  # fmt: skip
CONFIGS = {
    "pix2struct": (TEXT, VISION),
    "deep encoder": (
        {**TEXT, "num_layers": 1, "relative_attention_num_buckets": 16,
         "relative_attention_max_distance": 20},
        {**VISION, "num_hidden_layers": 3, "patch_embed_hidden_size": 48, "seq_len": 33},
    ),
    "many heads": (
        {**TEXT, "hidden_size": 32, "num_heads": 4, "d_ff": 20, "layer_norm_epsilon": 1e-5},
        {**VISION, "hidden_size": 32, "num_attention_heads": 4, "d_ff": 20, "layer_norm_eps": 1e-5},
    ),
}  # fmt: skip
MAX_PATCHES = 24
MODEL = transformers.Pix2StructForConditionalGeneration


def raw_config(name: str, **changes) -> dict:
    """Returns a config.json."""
    text, vision = CONFIGS[name]
    return {
        "model_type": "pix2struct",
        "architectures": ["Pix2StructForConditionalGeneration"],
        "text_config": {**text, "model_type": "pix2struct_text_model"},
        "vision_config": {**vision, "model_type": "pix2struct_vision_model"},
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "is_vqa": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "transformers_version": "4.28.0",
        **changes,
    }


def random_weights(raw: dict, seed: int) -> dict[str, torch.Tensor]:
    """Returns random weights for a config, of scales that make every part of the model matter."""
    config = transformers.Pix2StructConfig(
        **{key: raw[key] for key in ("text_config", "vision_config", "tie_word_embeddings")}
    )
    rng = np.random.default_rng(seed)
    weights = {}
    for name, tensor in MODEL(config).state_dict().items():
        if "layer_norm" in name or "layernorm" in name:
            value = rng.uniform(0.5, 1.5, tensor.shape)
        elif any(part in name for part in ("embed_tokens", "embedder", "bias")):
            value = rng.normal(size=tensor.shape)
        else:
            value = rng.normal(size=tensor.shape) * 0.8 * tensor.shape[-1] ** -0.5
        weights[name] = torch.tensor(value, dtype=torch.float32)
    if raw["tie_word_embeddings"]:
        del weights["decoder.lm_head.weight"]
    return weights


def write_checkpoint(folder: Path, raw: dict, weights: dict[str, torch.Tensor]) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def random_inputs(raw: dict, seed: int, images=((3, 4), (1, 2), (2, 5)), targets=(7, 5, 6)) -> dict:
    """Returns a padded batch of images of (rows, columns) patches, and of targets."""
    rng = np.random.default_rng(seed)
    length = max(rows * columns for rows, columns in images) + 1
    patch_dim = raw["vision_config"]["patch_embed_hidden_size"]
    patches = np.zeros((len(images), length, 2 + patch_dim), np.float32)
    decoder = np.zeros((len(targets), max(targets)), np.int32)
    for row, ((rows, columns), target) in enumerate(zip(images, targets, strict=True)):
        ids = np.stack(np.mgrid[1 : rows + 1, 1 : columns + 1], -1).reshape(-1, 2)
        patches[row, : len(ids), :2] = ids
        patches[row, : len(ids), 2:] = rng.normal(size=(len(ids), patch_dim))
        decoder[row, :target] = rng.integers(1, raw["text_config"]["vocab_size"], target)
    inputs = np.concatenate([np.zeros_like(decoder[:, :1]), decoder[:, :-1]], axis=1)
    return {"encoder": patches, "decoder_inputs": inputs, "decoder_targets": decoder}


def reference_logits(folder: Path, inputs: dict) -> np.ndarray:
    """Returns the logits of transformers' model [B, T, V]; fails if a weight was not loaded."""
    model, info = MODEL.from_pretrained(folder, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        raise ValueError(f"{folder}: {problems}")
    patches = torch.tensor(inputs["encoder"])
    with torch.no_grad():
        output = model.eval()(
            flattened_patches=patches,
            attention_mask=(patches[..., 0] > 0).float(),
            decoder_input_ids=torch.tensor(inputs["decoder_inputs"], dtype=torch.long),
        )
    return output.logits.float().numpy()


def smooth_image(seed: int) -> np.ndarray:
    """Returns an image [70, 110, 3] uint8 of random waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:70, :110][..., np.newaxis]
    frequencies, phases = rng.uniform(0.02, 0.6, (2, 3)), rng.uniform(0, 6, 3)
    return (127 + 120 * np.sin(frequencies[0] * y + frequencies[1] * x + phases)).astype(np.uint8)


def reference_patches(image: np.ndarray, max_patches: int) -> np.ndarray:
    """Returns the flattened patches of transformers' image processor [max_patches, 770]."""
    processor = image_processing_pil_pix2struct.Pix2StructImageProcessorPil()
    found = processor.preprocess(image, max_patches=max_patches, return_tensors="np")
    return found["flattened_patches"][0].astype(np.float32)


def main() -> None:
    """Makes the golden files."""
    folder = FOLDER / "pix2struct"
    raw = raw_config("pix2struct")
    write_checkpoint(folder, raw, random_weights(raw, 0))
    inputs = random_inputs(raw, 0)
    np.savez_compressed(folder / "logits.npz", logits=reference_logits(folder, inputs), **inputs)
    image = smooth_image(0)
    np.savez_compressed(
        folder / "patches.npz", image=image, patches=reference_patches(image, MAX_PATCHES)
    )


if __name__ == "__main__":
    main()
