"""Reading and writing checkpoints: Hugging Face's and T5X's, and adapter-only files."""

from coda_jax.checkpoints.adapter_files import load_adapter, save_adapter
from coda_jax.checkpoints.huggingface import load_hf, save_hf
from coda_jax.checkpoints.swap import swap_in
from coda_jax.checkpoints.t5x_files import load_t5x, save_t5x

__all__ = [
    "load_adapter",
    "load_hf",
    "load_t5x",
    "save_adapter",
    "save_hf",
    "save_t5x",
    "swap_in",
]
