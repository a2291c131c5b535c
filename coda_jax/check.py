"""`coda check`: does a checkpoint fit a model, and what will the model cost?

To be asked before a pod is started. T5X drops parameters that the model lacks without a word, and
orbax does not compare shapes; here every leaf that is missing, extra or misshapen is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from coda_jax import checkpoints, flops
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.checkpoints.shapes import expected_shapes
from coda_jax.checkpoints.t5x_files import is_t5x, t5x_shapes
from coda_jax.convert import CONFIG_FILE
from coda_jax.network import T5Config
from coda_jax.routing import CodaConfig
from coda_jax.run_files import write_report

NEW_LEAVES = ("created", "restored")


def check(
    checkpoint: str,
    config: T5Config | None = None,
    adapter: AdapterConfig | None = None,
    coda: CodaConfig | None = None,
    *,
    trained: str = "adapters",
    new_leaves: str = "created",
    feature_lengths: Mapping[str, int] | None = None,
    read_values: bool = False,
    output: str | None = None,
) -> dict[str, Any]:
    """Compares a checkpoint with a model, and counts parameters and operations.

    Args:
        checkpoint: folder in Hugging Face layout or of T5X.
        config: the model's sizes; None for those that a Hugging Face checkpoint says itself.
        adapter: the model's adapter.
        coda: the model's routing.
        trained: what is trained, "adapters" or "all".
        new_leaves: "created" where training starts from a dense checkpoint, which must not have
            adapters and routers; "restored" where they must be in it.
        feature_lengths: tokens of "inputs" and "targets", for the operations.
        read_values: also reads every value, which finds missing and damaged parts of files.
        output: JSON file for the report.

    Returns:
        The report: "parameters" and "trained_parameters", and the operations of matrix products
        "flops_per_input_token" of the encoder, "flops_per_output_token" of the decoder (greedy),
        and "encoder_flops_ratio", the dense encoder's with adapters divided by the model's.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: leaves are missing, extra, misshapen or damaged (all are listed); a T5X
            checkpoint is given without a config.
    """
    if config is None:
        if is_t5x(Path(checkpoint)):
            raise ValueError(f"{checkpoint} is of T5X and does not say its sizes: give the config.")
        config = checkpoints.load_hf(checkpoint)[0]
    config = config.replace(adapter=adapter, coda=coda)
    check_leaves(config, checkpoint, new_leaves)
    if read_values:
        _read_values(checkpoint)
    shapes = expected_shapes(config)
    report = {
        "parameters": params_lib.count(shapes),
        "trained_parameters": params_lib.count(params_lib.partition(shapes, trained)[0]),
        **costs(config, **(feature_lengths or {"inputs": 512, "targets": 64})),
    }
    print(f"{checkpoint} fits the model.")
    for name, value in report.items():
        print(f"{name:24}{value:>20,.2f}" if isinstance(value, float) else f"{name:24}{value:>20,}")
    if output is not None:
        write_report(output, report)
    return report


def check_leaves(config: T5Config, checkpoint: str, new_leaves: str = "created") -> None:
    """Raises where a checkpoint's leaves are not a model's; see `check`. No values are read."""
    if new_leaves not in NEW_LEAVES:
        raise ValueError(f"new_leaves={new_leaves!r} must be one of {NEW_LEAVES}.")
    if new_leaves == "created":
        config = config.dense()
    what = f"The leaves of {checkpoint}, where adapters and routers are to be {new_leaves}, do"
    params_lib.check_tree(expected_shapes(config), stored_shapes(checkpoint), what=what)


def stored_shapes(checkpoint: str) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` of a checkpoint in Hugging Face's or T5X's layout.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if (Path(checkpoint) / CONFIG_FILE).is_file():
        _, params = checkpoints.load_hf(checkpoint)  # values are read when first used
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return t5x_shapes(checkpoint)


def _read_values(checkpoint: str) -> None:
    if is_t5x(Path(checkpoint)):
        checkpoints.load_t5x(checkpoint)
    else:
        jax.tree.map(lambda leaf: leaf.copy(), checkpoints.load_hf(checkpoint)[1])


def costs(config: T5Config, inputs: int, targets: int) -> dict[str, float]:
    """Operations per token of one example of full length, counted as in `flops`.

    Args:
        config: the model's.
        inputs: input tokens.
        targets: output tokens.
    """
    encoder = flops.encoder_flops(config, 1, inputs)
    dense = flops.encoder_flops(config.replace(coda=None), 1, inputs)
    decoder = flops.answer_flops(config, 1, inputs, targets) - encoder
    return {
        "flops_per_input_token": encoder / inputs,
        "flops_per_output_token": decoder / targets,
        "encoder_flops_ratio": dense / encoder,
    }
