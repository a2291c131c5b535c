"""The encoder of Hugging Face's T5 in torch on a GPU: bfloat16, sdpa, as it is and compiled.

    python benchmarks/gpu_torch.py --json=benchmarks/results/gpu_torch.json

Random weights in the sizes of T5 v1.1, batch 32, 512 tokens; medians.
"""

import argparse
import json
import pathlib
import statistics

import torch
import transformers

SHAPE = 32, 512
ROUNDS = 20
# Width, feed-forward, layers, heads; as `coda_jax.models.preset`, which needs jax.
SIZES = {"base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32)}


def encoder(size: str) -> torch.nn.Module:
    """The encoder, on the GPU."""
    width, hidden, layers, heads = SIZES[size]
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.device("cuda"):
        model = transformers.T5EncoderModel._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    return model.eval()


def milliseconds(call) -> float:
    """The median of `ROUNDS` calls, after three."""
    times = []
    for number in range(ROUNDS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


@torch.inference_mode()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--json", type=pathlib.Path, help="file for the report")
    options = parser.parse_args()
    report = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name(),
        "shape": SHAPE,
        "ms": {},
    }
    tokens = torch.randint(2, 32000, SHAPE, device="cuda")
    print("| torch, encoder | as it is | torch.compile |\n|---|---|---|")
    for size in options.sizes:
        model = encoder(size)
        compiled = torch.compile(model)
        row = [milliseconds(lambda f=f: f(input_ids=tokens)) for f in (model, compiled)]
        report["ms"][size] = dict(zip(("as it is", "torch.compile"), row, strict=True))
        print(f"| {size} | {row[0]:.2f} ms | {row[1]:.2f} ms |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
