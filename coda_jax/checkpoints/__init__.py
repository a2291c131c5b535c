"""Reading and writing checkpoints: Hugging Face directories and adapter-only files."""

from coda_jax.checkpoints.adapter_files import load_adapter, save_adapter
from coda_jax.checkpoints.huggingface import load_hf, save_hf
from coda_jax.checkpoints.swap import swap_in

__all__ = ["load_adapter", "load_hf", "save_adapter", "save_hf", "swap_in"]
