"""Makes one tiny T5 in each format of weights, as PyTorch, Flax and transformers write them.

Run `python tests/golden/make_golden_weights.py` from the repository root, with torch, flax and
transformers 4.57 (the last that has Flax classes) installed, to make the file again. Each folder in
it has the config and the same weights: `safetensors`, `bin`, `bin_shards`, `bin_legacy` (as before
PyTorch 1.6), `bin_float16`, `bin_bfloat16`, `flax`, `flax_shards`, `flax_bfloat16`.
"""

from pathlib import Path
import tarfile
import tempfile

import jax.numpy as jnp
import torch
import transformers

OUTPUT = Path(__file__).parent / "weights" / "files.tar.xz"
CONFIG = {"d_model": 6, "d_kv": 2, "d_ff": 5, "num_heads": 2, "num_layers": 1, "vocab_size": 10,
          "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip
SHARD = "2KB"

_clip = jnp.clip
jnp.clip = lambda x, a_min=None, a_max=None: _clip(x, a_min, a_max)  # as those classes call it


def save_bin(folder: Path, model, dtype=torch.float32, **options) -> None:
    """Saves a state dict as it is, but for the dtype: with tied tensors, and its `_metadata`."""
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    for name in weights:
        weights[name] = weights[name].to(dtype)
    torch.save(weights, folder / "pytorch_model.bin", **options)


def main() -> None:
    """Writes all folders and packs them."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**CONFIG))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder / "safetensors")
        model.save_pretrained(folder / "bin", safe_serialization=False)
        model.save_pretrained(folder / "bin_shards", safe_serialization=False, max_shard_size=SHARD)
        save_bin(folder / "bin_legacy", model, _use_new_zipfile_serialization=False)
        save_bin(folder / "bin_float16", model, torch.float16)
        save_bin(folder / "bin_bfloat16", model, torch.bfloat16)
        flax = transformers.FlaxT5ForConditionalGeneration.from_pretrained(
            folder / "safetensors", from_pt=True
        )
        flax.save_pretrained(folder / "flax")
        flax.save_pretrained(folder / "flax_shards", max_shard_size=SHARD)
        flax.save_pretrained(folder / "flax_bfloat16", params=flax.to_bf16(flax.params))
        for file in folder.rglob("generation_config.json"):
            file.unlink()
        OUTPUT.parent.mkdir(exist_ok=True)
        with tarfile.open(OUTPUT, "w:xz", preset=9) as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)


if __name__ == "__main__":
    main()
