"""ONNX Runtime: three graphs of optimum's exporter, and a greedy loop over its own buffers."""

import numpy as np
import onnxruntime

from benchmarks.peers.engine import ONNX, THREADS, Case, Engine


def load(case: Case, precision: str) -> Engine:
    """ONNX Runtime with weights in "float32" or "int8" (dynamic quantization)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    folder = case.folder / ONNX.format(precision)
    encoder, first, later = (
        onnxruntime.InferenceSession(
            folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for name in ("encoder_model", "decoder_model", "decoder_with_past_model")
    )
    inputs = case.inputs.astype(np.int64)
    mask = np.ones_like(inputs)

    def encode():
        return encoder.run(None, {"input_ids": inputs, "attention_mask": mask})[0]

    def generate(length):
        values = {
            "encoder_attention_mask": onnxruntime.OrtValue.ortvalue_from_numpy(mask),
            "encoder_hidden_states": onnxruntime.OrtValue.ortvalue_from_numpy(encode()),
        }
        tokens = [np.zeros((len(inputs), 1), np.int64)]
        for session in [first] + [later] * (length - 1):
            logits = _step(session, values, tokens[-1])
            tokens.append(logits[:, -1].argmax(-1)[:, None])
        return np.concatenate(tokens[1:], axis=1)

    return Engine(encode, generate)


def _step(session, values: dict, tokens: np.ndarray) -> np.ndarray:
    """One run of a decoder; its new keys and values replace those in `values`."""
    values["input_ids"] = onnxruntime.OrtValue.ortvalue_from_numpy(tokens)
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    for argument in session.get_inputs():
        binding.bind_ortvalue_input(argument.name, values[argument.name])
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    for name, value in zip(names, binding.get_outputs(), strict=True):
        values[name.replace("present", "past_key_values")] = value
    return values["logits"].numpy()
