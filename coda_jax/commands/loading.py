"""A checkpoint, methods and an adapter file put together, by functions that gin files name."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from absl import logging
import jax

from coda_jax import checkpoints, checks, hub, methods, trees
from coda_jax.checkpoints.adapter import read_config, read_lengths, read_manifest
from coda_jax.checkpoints.generation_config import defaults_file, read_generation_config
from coda_jax.checkpoints.swap_in import add_head, encoder_of
from coda_jax.data.batches import SHORTEST, rounded_up
from coda_jax.data.labels import LABEL, read_labels
from coda_jax.data.vocabularies import find_fingerprint
from coda_jax.inference import Decoding
from coda_jax.methods import max_segments, with_reduction
from coda_jax.models import Inputs, ModelConfig, init_params, inputs_of, param_shapes, preset
from coda_jax.nn.quantized import KIND
from coda_jax.objectives import model_for
from coda_jax.optional import needs


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters, and where they came from.

    Attributes:
        config: the model's configuration.
        params: the parameter tree.
        directory: the checkpoint's folder, or None for a model that starts at random.
        adapter: {the adapter's folder: the fingerprint of its vocabulary}, where it has one.
        lengths: {"inputs", "targets"} of the adapter's training: see `save_adapter`; {} if unknown.
        checkpoint: the checkpoint as it was given, a folder or a name; None for none.
        adapters: {name: folder} of adapters that its inputs choose from; None for what it is.
    """

    config: ModelConfig
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    directory: pathlib.Path | None
    adapter: Mapping[str, str] | None = None
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    checkpoint: str | None = None
    adapters: Mapping[str, str] | None = None

    @property
    def vocabulary(self) -> dict[str, Any]:
        """What a vocabulary must agree with: the arguments of `check_vocabulary`."""
        ids = {name: getattr(self.config, name) for name in ("vocab_size", "eos_id", "pad_id")}
        return {"directory": self.directory, "adapter": self.adapter, **ids}

    @property
    def layout(self) -> dict[str, Any]:
        """What batches must know of the model: arguments of `Data.batches`."""
        return {
            "max_segments": max_segments(self.config.methods),
            "pad_id": self.config.pad_id,
            "start_id": self.config.decoder_start_id,
            "eos_id": self.config.eos_id,
        }

    @property
    def inputs(self) -> Inputs:
        """The inputs of its family, as its checkpoint prepares them."""
        return inputs_of(self.config, self.directory)

    @property
    def longest_inputs(self) -> int:
        """The most inputs that are kept where nobody says another limit."""
        return self.lengths.get("inputs") or self.inputs.longest


def configured_preset(
    name: str | None, changes: Mapping[str, Any] | None = None
) -> ModelConfig | None:
    """A published size with other values for some fields; None for no name.

    Raises:
        ValueError: there is no such size or field, or a value is out of its range.
    """
    if changes is not None and not isinstance(changes, Mapping):
        raise checks.wrong("PRESET_CHANGES", "a dictionary such as {'vocab_size': 1000}", changes)
    if name is None and changes:
        raise ValueError(f"PRESET_CHANGES={dict(changes)} has no effect without a PRESET")
    return None if name is None else preset(name, **{str(k): x for k, x in (changes or {}).items()})


def head(
    kind: str | None = None,
    pooling: str | None = None,
    train_file: str | None = None,
    adapter_checkpoint: str | None = None,
    field: str = LABEL,
) -> dict[str, Any]:
    """The values of an encoder's head: those of an adapter that has one, else the given ones.

    Args:
        kind: "classification" or "regression"; None for that of the adapter, else the first.
        pooling: how outputs become one; None for that of the adapter, else "mean".
        train_file: whose labels a fresh classification has.
        adapter_checkpoint: folder that `save_adapter` wrote.
        field: of the file, that has the labels; see `read_labels`.

    Returns:
        {"head", "labels", "pooling"}, as `load_model` takes them.

    Raises:
        ValueError: the adapter has another head; or a classification has no file of labels.
    """
    checks.paths(TRAIN_FILE=train_file, INITIAL_ADAPTER_PATH=adapter_checkpoint)
    saved = adapter_checkpoint and read_config(adapter_checkpoint)
    if saved and getattr(saved, "head", None):
        values = {name: getattr(saved, name) for name in ("head", "labels", "pooling")}
        for name, asked in (("head", kind), ("pooling", pooling)):
            if asked not in (None, values[name]):
                raise ValueError(f"{adapter_checkpoint} has {name}={values[name]!r}, not {asked!r}")
        return values
    values = {"head": kind or "classification", "labels": (), "pooling": pooling or "mean"}
    if values["head"] == "classification":
        if train_file is None:
            raise ValueError("the labels of a classification are read from TRAIN_FILE: name it")
        values["labels"] = read_labels(train_file, field)
    return values


def labels_of(head: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of what `head` returns. For gin files."""
    return head["labels"]


def configured_methods(names: Sequence[str]) -> tuple[methods.Method, ...]:
    """The methods of these names, each with the values that gin files give its fields.

    Raises:
        ValueError: a name is unknown, or given twice.
    """
    with needs():  # Here: the core runs where gin is not installed.
        import gin

    if isinstance(names, str):
        raise ValueError(f"METHODS={names!r} must be a tuple of names, such as ({names!r},)")

    def make(cls):
        try:
            configurable = gin.get_configurable(cls)
        except ValueError:  # no gin file says anything about it
            configurable = cls
        return configurable()

    return methods.ordered(make(methods.find(name)) for name in names)


def load_model(
    checkpoint: str | None = None,
    *,
    config: ModelConfig | None = None,
    adapter_checkpoint: str | None = None,
    methods: Sequence[methods.Method] | None = None,
    reduction: float | tuple[float, ...] | None = None,
    dtype: Any = "float32",
    dropout_rate: float = 0.0,
    remat_policy: str = "none",
    seed: int = 0,
    head: Mapping[str, Any] | None = None,
    encoder_only: bool = False,
    quantize: str | None = None,
) -> LoadedModel:
    """A checkpoint with an adapter from a file or a fresh one; or a model that starts at random.

    Args:
        checkpoint: folder in Hugging Face layout, or a name in the Hub's cache; None for no file.
        config: the sizes of a model that starts at random; a checkpoint's must be the same, but a
            model without a head gets a fresh one of this config's, as where the adapter has none.
        adapter_checkpoint: folder that `save_adapter` wrote for this checkpoint.
        methods: how to adapt; None or () for those of `adapter_checkpoint`, or for none. They may
            differ from its in what changes no leaf, and train more.
        reduction: replaces that of the routing.
        dtype, dropout_rate, remat_policy: see `ModelConfig`.
        seed: of what is created.
        head: values of the config's `head_fields`, for an encoder alone: how outputs are read.
        encoder_only: whether the encoder is taken alone, as it is for a head or an adapter of one.
        quantize: "int8" for frozen matrices in int8; None for what the adapter was trained on.

    Raises:
        ValueError: neither `checkpoint` nor `config` is given, or they differ; the methods
            contradict `adapter_checkpoint`; a value is out of range, or of no use.
    """
    checks.paths(INITIAL_CHECKPOINT_PATH=checkpoint, INITIAL_ADAPTER_PATH=adapter_checkpoint)
    run = _checked(dtype=dtype, dropout_rate=dropout_rate, remat_policy=remat_policy)
    rng, given = jax.random.key(checks.SEED("SEED", seed)), config
    KIND("QUANTIZE", quantize)
    directory = None if checkpoint is None else hub.find(checkpoint)
    config, params = _base(directory, given, rng)
    of_encoder = adapter_checkpoint and not read_config(adapter_checkpoint).num_decoder_layers
    if head or encoder_only or of_encoder:
        config, params = encoder_of(config, params)
        given = _headed(given, config, head or {})
    config = config.replace(**run)
    if adapter_checkpoint is None:
        chosen = tuple(methods or (given.methods if given else ()))
        config = _with_head_of(config, given).replace(methods=chosen)
        params = checkpoints.swap_in(config, params, rng)
    else:
        read = checkpoints.load_adapter(adapter_checkpoint, config, params)
        config, params = _with_changes(*read, methods, given, rng, adapter_checkpoint)
    if reduction is not None:
        config = config.replace(methods=with_reduction(config.methods, reduction))
    if quantize is not None:
        params = checkpoints.quantize(config, params, quantize)
    adapter = adapter_checkpoint and _vocabulary_of(adapter_checkpoint, directory)
    named = checkpoint and str(checkpoint)
    return LoadedModel(config, params, directory, adapter, read_lengths(adapter_checkpoint), named)


def _with_changes(config, params, methods, given, rng, adapter_checkpoint):
    """What an adapter file gives, with other methods and a fresh head where these are asked for."""
    config = _with_head_of(_continued(config, methods, adapter_checkpoint), given)
    if given is not None:
        _check_sizes(given, config.dense(), adapter_checkpoint)
    return config, add_head(config, params, rng)


def _checked(**run: Any) -> dict[str, Any]:
    """Values of the config's `run_fields`; an error has their names as macros."""
    return {x: ModelConfig.field_checks[x](x.upper(), value) for x, value in run.items()}


def sized(decoding: Decoding, model: LoadedModel) -> Decoding:
    """With the longest input of the adapter's training, or the family's, where none is said."""
    longest = decoding.max_input_length or model.longest_inputs
    return dataclasses.replace(decoding, max_input_length=longest)


def held_at_once(model: LoadedModel, decoding: Decoding) -> int:
    """Inputs held at once: texts are worth sorting by length, images and audio are large."""
    return model.inputs.held or 8 * decoding.batch_size


def with_checkpoint_defaults(
    decoding: Decoding, model: LoadedModel, targets: int | None = None
) -> Decoding:
    """Lengths, and what the checkpoint's `defaults_file` asks for, where nothing is said; logged.

    Outputs may be as long as the model's can be, if that has a limit; or else as the longest
    target, rounded up; or as the file says.

    Args:
        decoding: what is asked for.
        model: what decodes.
        targets: the longest target, where it is known; otherwise that of the adapter's training.

    Returns:
        The options, with nothing left open.

    Raises:
        ValueError: the file is not for this model; options contradict each other.
    """
    prefix_length = len(decoding.decoder_prefix or ())
    decoding = sized(decoding, model)
    if decoding.max_decode_length is None:
        longest = model_for(model.config).longest_output(decoding.max_input_length)
        targets = targets or model.lengths.get("targets")
        if longest is None and targets is not None:
            longest = rounded_up(targets + prefix_length, SHORTEST["targets"])
        decoding = dataclasses.replace(decoding, max_decode_length=longest)
    if model.directory is None:
        return decoding.resolved()
    file = defaults_file(model.directory)
    defaults = read_generation_config(model.directory, model.config, prefix_length)
    taken = defaults
    try:
        decoding, taken = decoding.with_defaults(defaults)
        said = ", ".join(f"{name}={value!r}" for name, value in taken.items())
        if taken:
            logging.warning("%s: %s", file, said)
        return decoding.resolved()
    except ValueError as error:
        if not taken:
            raise
        raise ValueError(f"{error} ({file} asks for {taken})") from error


def _base(
    directory: pathlib.Path | None, given: ModelConfig | None, rng: jax.Array
) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The dense model: from a checkpoint, whose sizes must be those given, or random."""
    checks.Maybe(checks.InstanceOf(ModelConfig))("CONFIG", given)
    if directory is None:
        if given is None:
            raise ValueError("load_model needs a checkpoint or, to start at random, a config")
        return given.dense(), init_params(given.dense(), rng)
    config, params = checkpoints.load_hf(directory)
    if given is not None:
        _check_sizes(given, _with_head_of(config, given), directory)
    return config, params


def _headed(
    given: ModelConfig | None, encoder: ModelConfig, head: Mapping[str, Any]
) -> ModelConfig | None:
    """A given config as that of an encoder alone, with the values of a head."""
    if given is None and head:
        return encoder.replace(**head)
    if given is not None and given.num_decoder_layers:
        given = given.encoder_only()
    return given and given.replace(**head)


def _with_head_of(config: ModelConfig, given: ModelConfig | None) -> ModelConfig:
    """The config with the head of another, where it has none."""
    if given is None or not config.lacks_head or given.family != config.family:
        return config
    return config.replace(**{name: getattr(given, name) for name in config.head_fields})


def _check_sizes(given: ModelConfig, stored: ModelConfig, checkpoint: object) -> None:
    """Raises ValueError where a config differs in more than how it computes and is trained."""
    if type(given) is not type(stored):
        raise ValueError(f"{checkpoint} is a {stored.family!r}, not a {given.family!r}")
    different = given.dense().differences(stored, given.run_fields)
    if different:
        raise ValueError(f"{checkpoint} is not of the given config: {'; '.join(different)}")


def _continued(
    config: ModelConfig, given: Sequence[methods.Method] | None, adapter_checkpoint: str
) -> ModelConfig:
    """The config of an adapter file with the given methods in the place of the saved ones.

    Raises:
        ValueError: the saved leaves are not those of the given methods.
    """
    if not given:
        return config
    saved = {method.name: method for method in config.methods}
    continued = config.replace(methods=tuple(given))
    for method in continued.methods:
        if method.name in saved and not method.continues(saved[method.name]):
            raise ValueError(f"{adapter_checkpoint} holds {saved[method.name]}, not {method}")
    what = f"{adapter_checkpoint} and the given methods: the leaves do"
    trees.check_tree(param_shapes(continued), param_shapes(config), what=what)
    return continued


def _vocabulary_of(
    adapter_checkpoint: str, directory: pathlib.Path | None
) -> dict[str, str] | None:
    """{the adapter: the vocabulary that it was trained with}, None where it does not say one.

    Raises:
        ValueError: the base's vocabulary is another one.
    """
    expected = read_manifest(adapter_checkpoint).get("vocabulary")
    found = directory and find_fingerprint(directory)
    if expected and found and expected != found:
        raise ValueError(
            f"{adapter_checkpoint} was trained with another vocabulary than that of {directory} "
            f"(SHA-256 {expected}, {found})"
        )
    return {adapter_checkpoint: expected} if expected else None
