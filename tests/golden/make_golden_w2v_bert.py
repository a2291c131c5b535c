"""Makes a small random w2v-BERT with a CTC head, its logits, and features, as transformers does.

Run `python tests/golden/make_golden_w2v_bert.py` from the repository root, with torch and
transformers installed, to make the files again. The configurations other than `w2v_bert` are for
the test that compares with transformers itself.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
import torch
import transformers

FOLDER = Path(__file__).parent
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "feature_projection_input_dim": 10,
    "conv_depthwise_kernel_size": 5,
    "left_max_position_embeddings": 6,
    "right_max_position_embeddings": 3,
    "vocab_size": 13,
}
CTC, ENCODER = "Wav2Vec2BertForCTC", "Wav2Vec2BertModel"
CONFIGS = {
    "w2v_bert": (CTC, SIZES),
    "without a head": (ENCODER, {**SIZES, "vocab_size": None}),
    "another blank": (CTC, {**SIZES, "pad_token_id": 12, "layer_norm_eps": 1e-3}),
    "published distances": (
        CTC,
        {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1,
         "conv_depthwise_kernel_size": 31, "left_max_position_embeddings": 64,
         "right_max_position_embeddings": 8, "hidden_act": "silu"},
    ),
}  # fmt: skip


def raw_config(name: str, **changes) -> dict:
    """Returns a config.json, with fields of the published one that change no logits."""
    architecture, sizes = CONFIGS[name]
    return {
        "model_type": "wav2vec2-bert",
        "architectures": [architecture],
        **sizes,
        "add_adapter": False,
        "adapter_kernel_size": 3,
        "conformer_conv_dropout": 0.1,
        "ctc_zero_infinity": False,
        "layerdrop": 0.1,
        "mask_time_prob": 0.05,
        "num_negatives": 100,
        "position_embeddings_type": "relative_key",
        "tdnn_dim": [512, 512, 512, 512, 1500],
        "transformers_version": "4.37.0",
        **changes,
    }


def random_weights(raw: dict, seed: int) -> dict[str, torch.Tensor]:
    """Returns random weights for a config, of scales that make every part of the model matter."""
    fields = {key: value for key, value in raw.items() if key not in ("num_negatives",)}
    model = getattr(transformers, raw["architectures"][0])
    rng = np.random.default_rng(seed)
    weights = {}
    for name, tensor in model(transformers.Wav2Vec2BertConfig(**fields)).state_dict().items():
        value = rng.normal(size=tensor.shape)
        if "norm.weight" in name:
            value = rng.uniform(0.5, 1.5, tensor.shape)
        elif tensor.ndim > 1:
            value *= np.prod(tensor.shape[1:]) ** -0.5
        weights[name] = torch.tensor(value, dtype=torch.float32)
    return weights


def write_checkpoint(folder: Path, raw: dict, weights: dict[str, torch.Tensor]) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def random_inputs(raw: dict, seed: int, lengths=(19, 7, 1)) -> dict[str, np.ndarray]:
    """Returns padded features and their mask."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths) + 1)
    features = rng.normal(size=(*shape, raw["feature_projection_input_dim"])).astype(np.float32)
    return {"features": features, "mask": np.arange(shape[1]) < np.array(lengths)[:, None]}


def reference_output(folder: Path, inputs: dict) -> np.ndarray:
    """Returns the logits of transformers' model [B, N, V], or its last hidden state [B, N, D].

    Fails if a weight was not loaded.
    """
    raw = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, raw["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        raise ValueError(f"{folder}: {problems}")
    with torch.no_grad():
        output = model.eval()(
            input_features=torch.tensor(inputs["features"]),
            attention_mask=torch.tensor(inputs["mask"], dtype=torch.long),
        )
    return output[0].float().numpy()


def waveform(seed: int, num_samples: int) -> np.ndarray:
    """Returns 16 kHz samples [num_samples] float32: a rising tone in noise, then silence."""
    rng = np.random.default_rng(seed)
    seconds = np.arange(num_samples) / 16000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 1500 * seconds) * seconds)
    samples = tone + 0.01 * rng.normal(size=num_samples)
    samples[3 * num_samples // 4 :] = 0
    return samples.astype(np.float32)


def reference_features(samples: np.ndarray) -> np.ndarray:
    """Returns the features [N, 160] of transformers' extractor, without those that it masks."""
    extractor = transformers.SeamlessM4TFeatureExtractor()
    found = extractor(samples, sampling_rate=16000, return_tensors="np")
    return found["input_features"][0][found["attention_mask"][0] > 0]


def main() -> None:
    """Makes the golden files."""
    folder = FOLDER / "w2v_bert"
    raw = raw_config("w2v_bert")
    write_checkpoint(folder, raw, random_weights(raw, 0))
    inputs = random_inputs(raw, 0)
    np.savez_compressed(folder / "logits.npz", logits=reference_output(folder, inputs), **inputs)
    samples = waveform(0, 5000)
    np.savez_compressed(
        folder / "features.npz", samples=samples, features=reference_features(samples)
    )


if __name__ == "__main__":
    main()
