"""Our speed beside two torch libraries' adapters and routed block: same machine, shapes, in turns.

    python -m venv .venv-older
    .venv-older/bin/pip install -e . -r benchmarks/requirements_older.txt
    .venv-older/bin/python benchmarks/adapters_and_colt5.py --json=benchmarks/results/adapters.json

1. T5 with a parallel adapter, Hugging Face `transformers` + `adapters`. Comparable: the frozen
   model is the same, weight for weight (the script checks that the logits agree), and so are the
   tokens, the bottleneck and the number of decoded tokens. Not the same: `adapters` puts the
   bottleneck beside the feed-forward block only, ours is beside the whole layer; `transformers`
   decodes with a Python loop, ours with one compiled program.
2. One routed block of `CoLT5-attention`. Comparable: width, heads, the number of tokens in the
   heavy branches (K = N / r for queries, keys and feed-forward) and the operations of the heavy
   feed-forward (two matrices of 4 D there, three of 8/3 D here). Not the same: CoLT5's light branch
   (local attention and a small feed-forward on all tokens) stands where our adapter does, it
   routes three times a block, and its weights are its own.
"""

import argparse
from collections.abc import Callable
import tempfile

import adapters
from colt5_attention import ConditionalRoutedTransformerBlock
import jax
import numpy as np
import torch
import transformers

from coda_jax import checkpoints, files, methods
from coda_jax.commands import bench_programs
from coda_jax.methods.selection import num_selected
from coda_jax.models import preset
from coda_jax.objectives import model_for
from coda_jax.profiling import timing

TORCH = "transformers + adapters, parallel adapter"


def torch_t5(config, params) -> transformers.T5ForConditionalGeneration:
    """The same model in torch, with a parallel adapter of the same bottleneck."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints.save_hf(directory, config, params)
        model = transformers.T5ForConditionalGeneration.from_pretrained(directory)
    adapters.init(model)
    reduction_factor = config.emb_dim / methods.ParallelAdapter().bottleneck
    model.add_adapter("adapter", config=adapters.ParBnConfig(reduction_factor=reduction_factor))
    model.set_active_adapters("adapter")
    return model.eval()


def t5_calls(config, batch, reductions) -> tuple[dict[str, dict[str, Callable]], float]:
    """Calls by measure and name; and how far the logits of the two dense models are apart."""
    params = jax.jit(model_for(config).init)(jax.random.key(0))
    reference = torch_t5(config, params)
    inputs = torch.tensor(batch["encoder_input_tokens"], dtype=torch.long)
    decoder_inputs = torch.tensor(batch["decoder_input_tokens"], dtype=torch.long)
    length = decoder_inputs.shape[1]
    with torch.no_grad():
        expected = reference(input_ids=inputs, decoder_input_ids=decoder_inputs).logits.numpy()
    difference = np.abs(np.asarray(model_for(config).logits(params, batch)) - expected)
    relative = float(difference.max() / np.abs(expected).max())
    if relative > 1e-3:
        raise ValueError(f"the two models differ: logits are {relative} of their maximum apart")

    def encode():
        with torch.inference_mode():
            return reference.encoder(input_ids=inputs).last_hidden_state.numpy()

    def generate():
        with torch.inference_mode():
            return reference.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=length,
                min_new_tokens=length,
                num_beams=1,
                do_sample=False,
            ).numpy()

    calls = {"encoder": {TORCH: encode}, "end_to_end": {TORCH: generate}}
    for name, method in bench_programs.compared(config, reductions).items():
        if "k_to_all" not in name:
            adapted = checkpoints.swap_in(method, params, jax.random.key(0))
            programs = bench_programs.Programs(method, adapted, batch)
            for measure, functions in calls.items():
                _, functions[f"coda_jax, {name}"] = bench_programs.compiled_call(
                    measure, *getattr(programs, measure)()
                )
    return calls, relative


def block_calls(config, batch, reductions) -> dict[str, Callable]:
    """One routed block of each library, by name."""
    config = config.replace(num_encoder_layers=1, num_decoder_layers=1)
    rows, length = batch["encoder_input_tokens"].shape
    params = jax.jit(model_for(config).init)(jax.random.key(0))
    x = torch.randn(rows, length, config.emb_dim)
    calls = {}
    for r in reductions:
        heavy = num_selected(length, r)
        block = ConditionalRoutedTransformerBlock(
            config.emb_dim,
            num_heavy_attn_tokens_q=heavy,
            num_heavy_attn_tokens_kv=heavy,
            num_heavy_ff_tokens=heavy,
            heavy_heads=config.num_heads,
            heavy_dim_head=config.head_dim,
            heavy_ff_mult=4,
        ).eval()

        def run(block=block):
            with torch.inference_mode():
                return block(x).numpy()

        calls[f"CoLT5-attention, r = {r:g}"] = run
        method = bench_programs.compared(config, [r])[f"CoDA r = {r:g}, k_to_k"]
        adapted = checkpoints.swap_in(method, params, jax.random.key(0))
        encoder = bench_programs.Programs(method, adapted, batch).encoder()
        _, calls[f"coda_jax, r = {r:g}"] = bench_programs.compiled_call("encoder", *encoder)
    return calls


def markdown(report) -> str:
    """The report as tables."""
    settings = report["settings"]
    lines = [", ".join(f"{name} {value}" for name, value in settings.items())]
    lines += [f"largest difference of the logits: {report['logits_difference']:.1e} of their size"]
    for measure, rows in report["measures"].items():
        lines += ["", f"**{measure.replace('_', ' ')}**", "", "| | time |", "|---|---|"]
        lines += [f"| {name} | {row['ms']:.1f} ms |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="t5_1_1_base")
    parser.add_argument("--input_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--target_length", type=int, default=16)
    parser.add_argument("--reductions", type=float, nargs="+", default=[3, 5])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = preset(options.preset, dropout_rate=0.0)
    batch = bench_programs.random_batch(
        config, options.batch_size, options.input_length, options.target_length
    )
    calls, difference = t5_calls(config, batch, options.reductions)
    calls["block"] = block_calls(config, batch, options.reductions)
    timings = {
        measure: timing.time_interleaved(functions, options.rounds)
        for measure, functions in calls.items()
    }
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "adapters", "CoLT5-attention")
    report = {
        "settings": {k: v for k, v in vars(options).items() if k != "json"}
        | {"torch_threads": torch.get_num_threads()},
        "versions": timing.versions(packages),
        "logits_difference": difference,
        "measures": {
            measure: {
                name: {"ms": 1e3 * timing.median, "seconds": timing.seconds}
                for name, timing in rows.items()
            }
            for measure, rows in timings.items()
        },
    }
    print(markdown(report))
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
