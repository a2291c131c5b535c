"""`coda bench`: what routing saves over the same model with plain parallel adapters.

    coda bench --size=base --input_length=512 --batch_size=4 --reductions=3,5,8 --json=bench.json
    coda bench --family=pix2struct --input_length=4096 --batch_size=1 --reductions=4,8

Times the encoder, whole answers and training steps of the parallel adapter and of CoDA, in turns,
and sets the speed-ups beside what the arithmetic allows: the bound is the ratio of the programs'
floating-point operations. Needs jax and flax only.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax import benchmark, breakdown, checkpoints, decoding, flops, training
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.models import EncoderDecoder
from coda_jax.network import T5Config
from coda_jax.routing import CodaConfig
from coda_jax.run_files import write_report
from coda_jax.vision import Pix2StructConfig

# Configuration and vocabulary of published models, and by size: emb_dim, num_heads, layers of
# encoder and of decoder, mlp_dim.
FAMILIES: dict[str, tuple[type[T5Config], int]] = {
    "t5_1_1": (T5Config, 32128),
    "pix2struct": (Pix2StructConfig, 50244),
}
SIZES = {
    "t5_1_1": {
        "small": (512, 6, 8, 1024),
        "base": (768, 12, 12, 2048),
        "large": (1024, 16, 24, 2816),
        "xl": (2048, 32, 24, 5120),
        "xxl": (4096, 64, 24, 10240),
    },
    "pix2struct": {"base": (768, 12, 12, 2048), "large": (1536, 24, 18, 3968)},
}
BASELINE = "parallel adapter"
BOTTLENECK = 64
MEASURES = ("encoder", "end_to_end", "train_step", "parts")


def published(family: str, size: str, dtype: Any = "float32") -> T5Config:
    """The configuration of a published model of a family and size in `SIZES`."""
    config, vocab_size = FAMILIES[family]
    if size not in SIZES[family]:
        raise ValueError(f"size of {family} must be one of {tuple(SIZES[family])}, got {size!r}")
    emb_dim, num_heads, num_layers, mlp_dim = SIZES[family][size]
    return config(
        vocab_size=vocab_size,
        dtype=jnp.dtype(dtype).type,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        mlp_dim=mlp_dim,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )


def methods(dense: T5Config, reductions: Sequence[float]) -> dict[str, T5Config]:
    """The configurations that are compared, by name, the baseline first."""
    adapter = AdapterConfig(BOTTLENECK)
    configs = {BASELINE: dense.replace(adapter=adapter, coda=None)}
    for attention in ("k_to_k", "k_to_all"):
        for r in reductions:
            coda = CodaConfig(reduction=r, attention=attention)
            configs[f"CoDA r = {r:g}, {attention}"] = dense.replace(adapter=adapter, coda=coda)
    return configs


class Programs:
    """The compiled programs of one method, and calls of them on random tokens.

    Attributes:
        config: the method's configuration.
        params: the dense model's parameters, and the method's own.
    """

    def __init__(
        self, config: T5Config, dense_params: Mapping, batch: Mapping[str, np.ndarray], seed: int
    ):
        self.config = config
        self.params = checkpoints.swap_in(dense_params, config, jax.random.key(seed))
        self._model = EncoderDecoder(config)
        self._batch = jax.device_put(dict(batch))

    def encoder(self) -> tuple[jax.stages.Compiled, Callable]:
        """Encodes the batch."""
        arguments = self.params, self._batch["encoder_input_tokens"]
        compiled = jax.jit(self._model.encode).lower(*arguments).compile()
        return compiled, lambda: compiled(*arguments)

    def end_to_end(self) -> tuple[jax.stages.Compiled, Callable]:
        """Encodes the batch and decodes greedily up to the last place, whatever the weights say."""

        def answer(params, tokens):
            length = self._batch["decoder_target_tokens"].shape[1]
            return decoding.greedy(
                self._model.module, params, tokens, max_decode_length=length, eos_id=-1
            )

        arguments = self.params, self._batch["encoder_input_tokens"]
        compiled = jax.jit(answer).lower(*arguments).compile()
        return compiled, lambda: compiled(*arguments)

    def train_step(self) -> tuple[jax.stages.Compiled, Callable]:
        """One step of Adam on the adapters, routers and norms."""
        trained, frozen = params_lib.partition(self.params, "adapters")
        trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)
        optimizer = optax.adam(1e-4)
        state = training.TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
        step = training.make_train_step(self._model, optimizer, accumulation=1, seed=0)
        compiled = step.lower(state, frozen, self._batch).compile()

        def call():
            nonlocal state
            state, sums = compiled(state, frozen, self._batch)
            return sums

        return compiled, call


def random_batch(config: T5Config, batch: int, length: int, target_length: int) -> dict:
    """Random tokens or patches in full rows, as a batch of the trainer."""
    rng = np.random.default_rng(0)
    if isinstance(config, Pix2StructConfig):
        inputs = rng.standard_normal(config.input_spec(batch, length).shape, np.float32)
        side = math.ceil(length**0.5)
        inputs[..., :2] = 1 + np.stack(np.divmod(np.arange(length), side), axis=-1)
    else:
        inputs = rng.integers(2, config.vocab_size, (batch, length)).astype(np.int32)
    targets = rng.integers(2, config.vocab_size, (batch, target_length)).astype(np.int32)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones_like(targets),
    }


def measure(
    dense: T5Config,
    dense_params: Mapping,
    *,
    batch_size: int,
    input_length: int,
    target_length: int,
    reductions: Sequence[float],
    rounds: int = 20,
    measures: Sequence[str] = MEASURES,
) -> dict[str, Any]:
    """The report: for each method its sizes, and for each measure times, speed-up and bound.

    Args:
        dense: the model without adapters.
        dense_params: its parameters, in the dtype in which they are kept.
        batch_size: B.
        input_length: N.
        target_length: T, tokens decoded, and target tokens of a training step.
        reductions: r of each CoDA model.
        rounds: runs of each program that are counted.
        measures: what to time, of `MEASURES`.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown:
        raise ValueError(f"measures must be of {MEASURES}, got {unknown}")
    batch = random_batch(dense, batch_size, input_length, target_length)
    dense_params = jax.device_put(dense_params)
    programs = {
        name: Programs(config, dense_params, batch, seed=0)
        for name, config in methods(dense, reductions).items()
    }
    report: dict[str, Any] = {"methods": {name: _sizes(p.params) for name, p in programs.items()}}
    sizes = batch_size, input_length
    counts = {
        "encoder": lambda config: flops.encoder_flops(config, *sizes),
        "end_to_end": lambda config: flops.answer_flops(config, *sizes, target_length),
    }
    for name in measures:
        if name == "parts":
            report[name] = {
                method: breakdown.shares(*p.encoder()) for method, p in programs.items()
            }
        else:
            report[name] = _compare(programs, name, rounds, counts.get(name))
    return report


def _sizes(params: Mapping) -> dict[str, int]:
    trained, _ = params_lib.partition(params, "adapters")
    return {
        "parameters": params_lib.count(params),
        "trained_parameters": params_lib.count(trained),
    }


def _compare(
    programs: Mapping[str, Programs],
    measure_name: str,
    rounds: int,
    analytic: Callable[[T5Config], float] | None,
) -> dict[str, dict[str, Any]]:
    """Times one kind of program of all methods in turns."""
    compiled, calls = {}, {}
    for name, program in programs.items():
        compiled[name], calls[name] = getattr(program, measure_name)()
    timings = benchmark.time_interleaved(calls, rounds)
    # XLA counts the body of the decoding loop once: there, only the count by hand is of use.
    by_xla = measure_name != "end_to_end"
    rows: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        middle, low, high = benchmark.speed_up(timings[BASELINE], timing)
        row = {
            "ms": 1e3 * timing.median,
            "speed_up": middle,
            "speed_up_quartiles": [low, high],
            "flops": benchmark.flops(compiled[name]) if by_xla else None,
            "analytic_flops": analytic(programs[name].config) if analytic else None,
            "peak_memory_bytes": benchmark.peak_memory(compiled[name]),
        }
        rows[name] = row
        count = "flops" if by_xla else "analytic_flops"
        row["bound"] = rows[BASELINE][count] / row[count]
        row["fraction_of_bound"] = row["speed_up"] / row["bound"]
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables for people."""
    settings, found = report["settings"], report["versions"]
    lines = [
        f"{settings['model']}, {settings['dtype']}, batch {settings['batch_size']}, input "
        f"{settings['input_length']}, target {settings['target_length']}; {found['device']}, "
        f"jax {found['jax']}; medians of {settings['rounds']} rounds taken in turns.",
    ]
    for name in [name for name in MEASURES if name in report and name != "parts"]:
        lines += [
            "",
            f"**{name.replace('_', ' ')}**",
            "",
            "| | time | speed-up (quartiles) | GFLOPs (XLA) | GFLOPs (by hand) | bound "
            "| of the bound | memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, row in report[name].items():
            low, high = row["speed_up_quartiles"]
            lines.append(
                f"| {method} | {row['ms']:.1f} ms | {row['speed_up']:.2f}x ({low:.2f}-{high:.2f}) "
                f"| {_giga(row['flops'])} | {_giga(row['analytic_flops'])} | {row['bound']:.2f} "
                f"| {row['fraction_of_bound']:.2f} | {row['peak_memory_bytes'] / 2**20:.0f} MiB |"
            )
    if "parts" in report:
        names = [*breakdown.PARTS, breakdown.OTHER]
        lines += ["", "**shares of the encoder's time**", ""]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method, parts in report["parts"].items():
            shares = " | ".join(f"{parts[name]:.1%}" for name in names)
            lines.append(f"| {method} | {shares} |")
    lines += ["", "| | parameters | trained | share |", "|---|---|---|---|"]
    for method, row in report["methods"].items():
        total, trained = row["parameters"], row["trained_parameters"]
        lines.append(f"| {method} | {total:,} | {trained:,} | {trained / total:.2%} |")
    return "\n".join(lines) + "\n"


def _giga(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; prints the tables and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="coda bench",
        description="What routing saves over the same model with plain parallel adapters.",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--size", default="base", help="of a published model; random weights")
    model.add_argument("--checkpoint", help="folder in Hugging Face layout")
    parser.add_argument("--family", choices=FAMILIES, help="of --size; t5_1_1 if not given")
    parser.add_argument("--input_length", type=int, default=512, help="tokens or patches")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--target_length", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reductions", default="3,5", help="numbers with commas between them")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--measures", default=",".join(MEASURES), help="of these, with commas")
    parser.add_argument("--json", help="file for the report")
    options = parser.parse_args(arguments)
    dtype = jnp.dtype(options.dtype)
    family = options.family or "t5_1_1"
    if options.checkpoint and options.family:
        parser.error("argument --family: not allowed with argument --checkpoint")
    if options.checkpoint:
        config, params = checkpoints.load_hf(options.checkpoint)
        config = config.replace(dtype=dtype.type, dropout_rate=0.0)
    else:
        try:
            config = published(family, options.size, dtype)
        except ValueError as error:
            parser.error(str(error))
        params = jax.jit(EncoderDecoder(config).init)(jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    sizes = {
        "batch_size": options.batch_size,
        "input_length": options.input_length,
        "target_length": options.target_length,
        "rounds": options.rounds,
    }
    report = {
        "settings": {
            "model": options.checkpoint or f"{family}_{options.size}",
            "dtype": options.dtype,
            **sizes,
        },
        "versions": benchmark.versions(),
        **measure(
            config,
            params,
            reductions=[float(text) for text in options.reductions.split(",")],
            measures=options.measures.split(","),
            **sizes,
        ),
    }
    print(markdown(report))
    if options.json:
        write_report(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
