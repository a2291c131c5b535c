"""Reading and writing checkpoints.

| file | holds |
|---|---|
| `huggingface` | dense checkpoints in Hugging Face's layout |
| `own_layout` | dense checkpoints that have no place in that layout |
| `swap_in` | from a dense checkpoint to one with the leaves of its methods |
| `adapter` | adapter files: what was trained, without its base |
| `fingerprints` | SHA-256 of leaves |
| `quantization` | frozen matrices as int8 |
| `peft` | LoRA files of the library peft |
| `adapter_hub` | bottleneck files of the library adapters |
| `t5x`, `t5x_scanned`, `zarr_arrays` | T5X's checkpoints, without T5X |
| `t5x_record` | model and data of a T5X run, beside its checkpoints |
| `t5x_partial` | T5X's checkpoints of what was trained alone, and their base |
| `weights` | the weights of a folder, in whichever format they are |
| `tensor_files` | safetensors files and their shards |
| `msgpack_files` | Flax's weights |
| `torch_files`, `torch_pickles` | PyTorch's weights, without PyTorch and without running code |
| `generation_config` | how a checkpoint's makers decode with it |
| `config_json` | configurations as JSON |
"""

from coda_jax.checkpoints.adapter import load_adapter, save_adapter
from coda_jax.checkpoints.adapter_hub import is_adapter_hub, load_adapter_hub, save_adapter_hub
from coda_jax.checkpoints.huggingface import load_hf, load_hf_config, save_dense, save_hf
from coda_jax.checkpoints.peft import load_peft, save_peft
from coda_jax.checkpoints.quantization import quantize
from coda_jax.checkpoints.swap_in import encoder_of, swap_in
from coda_jax.checkpoints.t5x import load_t5x, save_t5x

__all__ = [
    "encoder_of",
    "is_adapter_hub",
    "load_adapter",
    "load_adapter_hub",
    "load_hf",
    "load_hf_config",
    "load_peft",
    "load_t5x",
    "quantize",
    "save_adapter",
    "save_adapter_hub",
    "save_dense",
    "save_hf",
    "save_peft",
    "save_t5x",
    "swap_in",
]
