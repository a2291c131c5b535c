"""Makes LoRA files with the library peft, and the logits that it computes with them.

Run `python tests/golden/make_golden_peft.py` from the repository root, with peft 0.21, torch and
transformers installed, to make peft/ again. The base is v1_1. The cases have peft's usual targets
of a T5; all of its projections with both switches of `Lora`; some of one layer of the encoder.
"""

from pathlib import Path

from make_golden import logits, random_inputs
import numpy as np
import peft
import torch
import transformers

FOLDER = Path(__file__).parent
ALL = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
CASES = {
    "usual": {"r": 4, "lora_alpha": 8, "task_type": "SEQ_2_SEQ_LM"},
    "dora": {"r": 3, "target_modules": ALL, "use_dora": True, "use_rslora": True},
    "one_layer": {"r": 2, "target_modules": r"encoder\.block\.1\..*\.(wo|q)"},
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives what LoRA trains other values than at its start."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 0.1 if "magnitude" in name else parameter.shape[-1] ** -0.5
                noise = scale * rng.normal(size=tuple(parameter.shape))
                parameter += torch.tensor(noise, dtype=parameter.dtype)


def main() -> None:
    """Makes all golden files."""
    for seed, (name, options) in enumerate(CASES.items()):
        base = transformers.T5ForConditionalGeneration.from_pretrained(FOLDER / "v1_1")
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        randomise(model, seed)
        folder = FOLDER / "peft" / name
        model.peft_config["default"].base_model_name_or_path = "v1_1"
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        inputs = random_inputs(64, seed)
        np.savez_compressed(folder / "logits.npz", logits=logits(model, inputs), **inputs)


if __name__ == "__main__":
    main()
