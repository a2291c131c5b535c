"""ONNX files of the weights that `benchmarks.peers.prepare` made, float32 and int8.

    python benchmarks/peers/export_onnx.py FOLDER

Runs in an environment of its own, without coda_jax: the exporter wants an older transformers (see
`benchmarks/requirements_older.txt`).
"""

import argparse
import pathlib

from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.exporters.onnx import main_export

HUGGING_FACE, ONNX = "hugging_face", "onnx_{}"
PARTS = ("encoder_model", "decoder_model", "decoder_with_past_model")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    exact, quantized = (folder / ONNX.format(precision) for precision in ("float32", "int8"))
    main_export(
        str(folder / HUGGING_FACE),
        output=exact,
        task="text2text-generation-with-past",
        do_validation=False,
    )
    quantized.mkdir(exist_ok=True)
    for part in PARTS:
        print(f"quantizing {part}")
        quantize_dynamic(
            exact / f"{part}.onnx",
            quantized / f"{part}.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


if __name__ == "__main__":
    main()
