"""Makes bottleneck files with the library adapters, and the logits that it computes with them.

Run `python tests/golden/make_golden_adapters_library.py` from the repository root, with torch,
adapters 1.2 and the transformers that it pins installed, to make adapters_library/ again. The base
is v1_1. The cases are the library's own presets and what lies between them: behind which sublayers,
what is read, a scaling that is fixed, learned, or learned for each channel, both formats.
"""

import json
from pathlib import Path

import adapters
from make_golden import logits, random_inputs
import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
CASES = {  # the class of options, what differs from its defaults, whether as safetensors
    "double_seq_bn": (adapters.DoubleSeqBnConfig, {"reduction_factor": 4}, True),
    "cross": (
        adapters.DoubleSeqBnConfig,
        {"reduction_factor": 5.0, "cross_adapter": True, "leave_out": [0, 3], "scaling": "channel",
         "non_linearity": "gelu_new"},
        True,
    ),
    "seq_bn": (adapters.SeqBnConfig, {"reduction_factor": {"default": 8}}, False),
    "plus": (
        adapters.AdapterPlusConfig,
        {"reduction_factor": 6, "non_linearity": "tanh", "mh_adapter": True,
         "stochastic_depth": 0.0},
        True,
    ),
    "par_bn": (adapters.ParBnConfig, {"reduction_factor": 3}, True),
    "scaled_par_bn": (
        adapters.ParBnConfig,
        {"reduction_factor": 8, "scaling": "learned", "mh_adapter": True, "cross_adapter": True,
         "non_linearity": "leakyrelu"},
        False,
    ),
}  # fmt: skip


def with_adapter(name: str) -> transformers.T5ForConditionalGeneration:
    """The base with an adapter of a case, active and with random values."""
    model = transformers.T5ForConditionalGeneration.from_pretrained(FOLDER / "v1_1")
    adapters.init(model)
    cls, options, _ = CASES[name]
    model.add_adapter(name, config=cls(**options))
    model.set_active_adapters(name)
    rng = np.random.default_rng([*CASES].index(name))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                noise = rng.normal(size=tuple(parameter.shape)) * parameter.shape[-1] ** -0.5
                parameter += torch.tensor(noise, dtype=parameter.dtype)
    return model


def main() -> None:
    """Makes all golden files."""
    for seed, (name, (_, _, as_safetensors)) in enumerate(CASES.items()):
        model, folder = with_adapter(name), FOLDER / "adapters_library" / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_adapter(folder, name, with_head=False, use_safetensors=as_safetensors)
        file = folder / "adapter_config.json"
        fields = {**json.loads(file.read_text()), "model_name": "v1_1"}  # not where it was
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        inputs = random_inputs(64, seed)
        np.savez_compressed(folder / "logits.npz", logits=logits(model, inputs), **inputs)


if __name__ == "__main__":
    main()
