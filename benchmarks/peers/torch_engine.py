"""torch: T5 of Hugging Face transformers, as it is and compiled."""

import torch
import transformers

from benchmarks.peers.engine import HUGGING_FACE, THREADS, Case, Engine


def load(case: Case, compiled: bool = False) -> Engine:
    """The model in float32.

    Args:
        case: weights and inputs.
        compiled: `torch.compile` for the encoder and for the decoding step, whose cache then has a
            fixed size.
    """
    torch.set_num_threads(THREADS)
    folder = case.folder / HUGGING_FACE
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = model.eval()
    inputs = torch.tensor(case.inputs, dtype=torch.long)
    mask = torch.ones_like(inputs)
    options = {"cache_implementation": "static"} if compiled else {}
    encoder = model.encoder
    if compiled:
        encoder.forward = torch.compile(encoder.forward)
        model.decoder.forward = torch.compile(model.decoder.forward)

    @torch.inference_mode()
    def encode():
        return encoder(input_ids=inputs).last_hidden_state.numpy()

    @torch.inference_mode()
    def generate(length):
        tokens = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=length,
            min_new_tokens=length,
            num_beams=1,
            do_sample=False,
            **options,
        )
        return tokens[:, 1:].numpy()

    return Engine(encode, generate)
