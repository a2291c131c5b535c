"""`coda check`: does a checkpoint fit a model, the model a pod, and what will it cost?

To be asked before a pod is started. T5X drops parameters that the model lacks without a word, and
orbax does not compare shapes; here every leaf that is missing, extra or misshapen is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
import types
from typing import Any

import jax

from coda_jax import checkpoints, checks, files, hub, trees
from coda_jax.checkpoints.huggingface import CONFIG_FILE
from coda_jax.checkpoints.t5x import is_t5x, read_t5x, t5x_shapes
from coda_jax.checkpoints.t5x_partial import is_partial
from coda_jax.checkpoints.t5x_scanned import is_stacked
from coda_jax.commands import check_topology
from coda_jax.data.batches import check_feature_lengths
from coda_jax.methods import METHODS, Method, created, partition, unrouted
from coda_jax.models import ModelConfig, param_shapes
from coda_jax.profiling import flops

NEW_LEAVES = ("found", "created", "restored")


def check(
    checkpoint: str | None = None,
    config: ModelConfig | None = None,
    methods: Sequence[Method] = (),
    *,
    new_leaves: str = "found",
    feature_lengths: Mapping[str, int] | None = None,
    read_values: bool = False,
    topology: check_topology.Settings | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Compares a checkpoint with a model, and counts parameters and operations.

    Args:
        checkpoint: folder in Hugging Face layout or of T5X, or the name of a model in the cache of
            the Hugging Face Hub; None for a config alone.
        config: the model's sizes; None for those that a Hugging Face checkpoint says itself.
        methods: how the model is adapted.
        new_leaves: "created" where the checkpoint must be dense, so that a training starts the
            methods' leaves anew; "restored" where they must be in it; "found" for whichever it is.
        feature_lengths: tokens of "inputs" and "targets", for the operations.
        read_values: also reads every value, which finds missing and damaged parts of files.
        topology: TPUs for which the model's programs are compiled, as `check_topology.settings`
            gives them.
        output: JSON file for the report.

    Returns:
        The report: "parameters" and "trained_parameters", the operations of matrix products
        "flops_per_input_token" of the encoder, "flops_per_output_token" of the decoder (greedy) and
        "encoder_flops_ratio", the dense encoder's with adapters by the model's, and "topology".

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: leaves are missing, extra, misshapen or damaged (all are listed); the mesh is
            for another model; or there are no sizes.
    """
    lengths = {"inputs": 512, "targets": 64} if feature_lengths is None else feature_lengths
    check_feature_lengths(lengths)
    checks.paths(INITIAL_CHECKPOINT_PATH=checkpoint, OUTPUT=output)
    checks.flag("READ_VALUES", read_values)
    config = _fitting(checkpoint, config, methods, new_leaves, read_values)
    check_topology.check_mesh(config, topology)
    report: dict[str, Any] = {**_counts(config), **costs(config, **lengths)}
    for name, value in report.items():
        print(f"{name:24}{value:>20,.{2 if value < 1000 else 0}f}")
    if topology is not None:
        report["topology"] = check_topology.measure(config, topology, **lengths)
        print(check_topology.markdown(report["topology"]), end="")
    if output is not None:
        files.write_json(output, report)
    return report


def _counts(config: ModelConfig) -> dict[str, int]:
    shapes = param_shapes(config)
    trained, _ = partition(config, shapes)
    return {"parameters": trees.count(shapes), "trained_parameters": trees.count(trained)}


def _fitting(
    checkpoint: str | None,
    config: ModelConfig | None,
    methods: Sequence[Method],
    new_leaves: str,
    read_values: bool,
) -> ModelConfig:
    """The config with its methods, which the checkpoint fits, if there is one."""
    if checkpoint is None:
        if config is None:
            raise ValueError("there is nothing to check: give INITIAL_CHECKPOINT_PATH or PRESET")
        if read_values:
            raise ValueError("READ_VALUES=True has no effect without INITIAL_CHECKPOINT_PATH")
        return config.replace(methods=tuple(methods))
    checkpoint = str(hub.find(checkpoint))
    if config is None:
        if is_t5x(Path(checkpoint)):
            raise ValueError(f"{checkpoint} is of T5X and does not say its sizes: give a PRESET")
        config = checkpoints.load_hf_config(checkpoint)
    config = config.replace(methods=tuple(methods))
    found = check_leaves(config, checkpoint, new_leaves)
    if read_values:
        _read_values(checkpoint)
    print(f"{checkpoint} fits the model: {start(config, found)}.")
    return config


def check_leaves(config: ModelConfig, checkpoint: str, new_leaves: str = "found") -> str:
    """`compare_leaves` of a checkpoint in Hugging Face's or T5X's layout. No values are read."""
    stored = trees.flatten(stored_shapes(checkpoint))
    shapes = {path: leaf.shape for path, leaf in stored.items()}
    return compare_leaves(config, shapes, checkpoint, new_leaves)


def compare_leaves(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...] | None],
    name: str,
    new_leaves: str = "found",
) -> str:
    """Compares the leaves of a checkpoint's table with a model's.

    Args:
        config: the model's.
        shapes: {path: shape} of the checkpoint, None for a shape that its table does not say.
        name: the checkpoint's, for people.
        new_leaves: see `check`.

    Returns:
        "restored" where the methods' leaves are in the checkpoint, be it that it has no others, as
        SAVE_TRAINED_ONLY leaves it; "created" where they are new.

    Raises:
        ValueError: the checkpoint is of another kind; or leaves are missing, extra or misshapen
            (all are listed).
    """
    checks.OneOf(NEW_LEAVES)("NEW_LEAVES", new_leaves)
    own = [x for x in trees.flatten(param_shapes(config)) if trees.matches(x, created(config))]
    there = [path for path in own if path in shapes]
    if new_leaves == "found":
        new_leaves = "restored" if there else "created"
    _check_kind(config, shapes, name, new_leaves, own, there)
    expected = param_shapes(config.dense() if new_leaves == "created" else config)
    if new_leaves == "restored" and is_partial(config, shapes):
        expected = partition(config, expected)[0]
    found = {path: types.SimpleNamespace(shape=shape) for path, shape in shapes.items()}
    what = f"the leaves of {name}, where those of the methods are to be {new_leaves}, do"
    trees.check_tree(expected, found, what=what)
    return new_leaves


def _check_kind(
    config: ModelConfig,
    shapes: Iterable[str],
    name: str,
    new_leaves: str,
    own: Sequence[str],
    there: Sequence[str],
) -> None:
    """Raises ValueError where a checkpoint is dense, adapted or stacked, and should not be."""
    names = tuple(method.name for method in config.methods)
    if stacked := [path for path in shapes if is_stacked(path)]:
        raise ValueError(
            f"{name} is of T5X's scalable T5, whose stacked layers ({stacked[0]}) are read from a "
            "local disk alone: copy it, or `coda convert` with LAYOUT='t5x' takes them apart"
        )
    if new_leaves == "restored" and own and not there:
        raise ValueError(
            f"{name} is a dense checkpoint: it has none of the {len(own)} leaves of METHODS={names}"
            f", such as {own[0]}. Give an adapted one; a training creates them with "
            "NEW_LEAVES='found'"
        )
    if new_leaves == "created" and there:
        raise ValueError(
            f"{name} is an adapted checkpoint: it has {len(there)} leaves of METHODS={names}, such "
            f"as {there[0]}. Give a dense one, or NEW_LEAVES='found' to go on from these"
        )
    others = [method for method in METHODS.values() if method.name not in names]
    extra = {x: m.name for m in others for x in shapes if trees.matches(x, m.creates)}
    if extra:
        first, owner = min(extra.items())
        raise ValueError(
            f"{name} was adapted with {sorted({*extra.values()})}: METHODS={names} does not use "
            f"{len(extra)} of its leaves, such as {first} of {owner!r}. Give its recipe, a file of "
            "methods/, or a dense checkpoint"
        )


def start(config: ModelConfig, new_leaves: str, reduction: float | None = None) -> str:
    """How a training starts from a checkpoint, in words.

    Args:
        config: the run's.
        new_leaves: what `compare_leaves` found.
        reduction: with which the checkpoint was trained, if that is known.
    """
    names = ", ".join(method.name for method in config.methods if method.creates)
    if not names:
        return "a checkpoint of the whole model"
    if new_leaves == "created":
        return f"a dense checkpoint, and the leaves of {names} start anew"
    trained = "" if reduction is None else f" (r = {reduction:g})"
    return f"an adapted checkpoint{trained}, and the leaves of {names} are restored"


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
        read_t5x(checkpoint)
    else:
        jax.tree.map(lambda leaf: leaf.copy(), checkpoints.load_hf(checkpoint)[1])


def costs(config: ModelConfig, inputs: int, targets: int) -> dict[str, float]:
    """Operations per token of one example of full length, counted as in `flops`.

    Args:
        config: the model's.
        inputs: input tokens.
        targets: output tokens.
    """
    encoder = flops.encoder_flops(config, 1, inputs)
    dense = flops.encoder_flops(config.replace(methods=unrouted(config.methods)), 1, inputs)
    decoder = flops.answer_flops(config, 1, inputs, targets) - encoder
    return {
        "flops_per_input_token": encoder / inputs,
        "flops_per_output_token": decoder / targets,
        "encoder_flops_ratio": dense / encoder,
    }
