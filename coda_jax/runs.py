"""What training does: a model, data and options, as gin configures them, put together.

The functions here are the ones that gin files name. Those that need seqio import it when called, so
that training from a cache file runs where neither seqio nor TensorFlow is installed.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import optax

from coda_jax import batches as batches_lib
from coda_jax import checkpoints, models, training
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.best_rq import BestRQ, BestRQConfig
from coda_jax.checkpoints.adapter_files import fingerprint
from coda_jax.network import T5Config, init_params
from coda_jax.routing import CodaConfig
from coda_jax.run_files import write_atomically


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters, and where they came from.

    Attributes:
        config: the model's configuration.
        params: the parameter tree.
        directory: the checkpoint's folder, or None for a model that starts at random.
    """

    config: T5Config
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    directory: pathlib.Path | None


def load_model(
    checkpoint: str | None = None,
    *,
    config: T5Config | None = None,
    adapter_checkpoint: str | None = None,
    adapter: AdapterConfig | None = None,
    coda: CodaConfig | None = None,
    reduction: float | tuple[float, ...] | None = None,
    dtype: Any = "float32",
    dropout_rate: float = 0.0,
    seed: int = 0,
) -> LoadedModel:
    """A checkpoint with an adapter from a file or a fresh one; or a model that starts at random.

    Args:
        checkpoint: folder in Hugging Face layout; None to start at random from `config`.
        config: the sizes of a model that starts at random; a checkpoint's must be the same, but a
            speech encoder without a CTC head gets a fresh one of this config's `vocab_size`, also
            where its adapter comes from a file that has none.
        adapter_checkpoint: folder that `save_adapter` wrote for this checkpoint.
        adapter: the adapter to create where `adapter_checkpoint` brings none.
        coda: the routing to create, or, with `adapter_checkpoint`, how to route instead.
        reduction: replaces that of the routing.
        dtype: of the computation.
        dropout_rate: in training.
        seed: of what is created.

    Raises:
        ValueError: neither `checkpoint` nor `config` is given, or they differ; `adapter`
            contradicts `adapter_checkpoint`; `reduction` is given for a model that does not route.
    """
    rng = jax.random.key(seed)
    if checkpoint is not None:
        given, (config, params) = config, checkpoints.load_hf(checkpoint)
        if given is not None and not config.vocab_size:  # a speech encoder, which gets a new head
            config = config.replace(vocab_size=given.vocab_size)
        _check_sizes(given or config, config, checkpoint)
    elif config is not None:
        params = init_params(config.dense().network(), rng)
    else:
        raise ValueError("load_model needs a checkpoint or, to start at random, a config")
    if adapter_checkpoint is not None:
        config, params = checkpoints.load_adapter(adapter_checkpoint, params)
        if adapter not in (None, config.adapter):
            raise ValueError(f"{adapter_checkpoint} holds {config.adapter}, not {adapter}")
        if given is not None and not config.vocab_size:  # pretrained without a head
            config = config.replace(vocab_size=given.vocab_size)
            dense, new = params_lib.split_new(params)
            params = params_lib.merge(checkpoints.swap_in(dense, config.dense(), rng), new)
    config = config.replace(
        adapter=adapter or config.adapter,
        coda=coda or config.coda,
        dtype=jnp.dtype(dtype).type,
        dropout_rate=dropout_rate,
    )
    if reduction is not None:
        if config.coda is None:
            raise ValueError(f"reduction={reduction} is given for a model that does not route")
        config = config.replace(coda=dataclasses.replace(config.coda, reduction=reduction))
    if adapter_checkpoint is None:
        params = checkpoints.swap_in(params, config, rng)
    return LoadedModel(config, params, checkpoint and pathlib.Path(checkpoint))


def _check_sizes(given: T5Config, stored: T5Config, checkpoint: str) -> None:
    """Raises ValueError where a config differs in more than how it computes and is trained."""
    given = given.dense().replace(dtype=stored.dtype, dropout_rate=stored.dropout_rate)
    different = [
        f"{field.name}={getattr(given, field.name)!r}, not {getattr(stored, field.name)!r}"
        for field in dataclasses.fields(stored)
        if getattr(given, field.name) != getattr(stored, field.name)
    ]
    if different:
        raise ValueError(f"{checkpoint} is not of the given config: {'; '.join(different)}")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from: a seqio task or mixture, a file of `coda cache`, or nothing.

    Attributes:
        feature_lengths: the most tokens, or patches, of "inputs" and tokens of "targets".
        task: name of a registered seqio task or mixture.
        cache: path of the file instead.
        split: the task's split.
        batch_size: rows of a batch.
        pack: whether several examples share a row.
        shuffle: whether the order is random, anew in each epoch.
        seed: of the order and of random preprocessing.
    """

    feature_lengths: Mapping[str, int]
    task: str | None = None
    cache: str | None = None
    split: str = "train"
    batch_size: int = 32
    pack: bool = False
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.task is not None and self.cache is not None:
            raise ValueError(f"give a task or a cache file, not both: {self.task=}, {self.cache=}")

    @property
    def exists(self) -> bool:
        """Whether a task or a file is named at all."""
        return self.task is not None or self.cache is not None

    def batches(self, config: T5Config, repeat: bool) -> Iterable[dict]:
        """Batches: for ever in full, or one pass whose last is filled up with empty rows."""
        if self.cache is not None:
            cached, _ = batches_lib.read_cache(self.cache)
            examples = batches_lib.epochs(
                cached,
                seed=self.seed,
                num_epochs=None if repeat else 1,
                shuffle=self.shuffle,
            )
        else:
            from coda_jax import data

            examples = data.seqio_examples(
                self.task,
                self.split,
                feature_lengths=self.feature_lengths,
                seed=self.seed,
                shuffle=self.shuffle,
                num_epochs=None if repeat else 1,
            )
        return batches_lib.batch_examples(
            examples,
            batch_size=self.batch_size,
            feature_lengths=self.feature_lengths,
            pack=self.pack,
            max_segments=config.coda.max_segments if self.pack and config.coda else None,
            drop_remainder=repeat,
        )

    def check_vocabulary(self, model: LoadedModel) -> None:
        """Raises ValueError where the data's token ids are not those of the model."""
        if self.cache is not None:
            _, metadata = batches_lib.read_cache(self.cache)
            missing = {"vocabulary", "vocab_size"} - metadata.keys()
            if missing:
                raise ValueError(f"{self.cache} does not say its {sorted(missing)}")
            fingerprint, num_ids = metadata["vocabulary"], metadata["vocab_size"]
        else:
            from coda_jax import data

            vocabulary = data.task_vocabulary(self.task)
            fingerprint = data.vocabulary_fingerprint(vocabulary)
            num_ids = vocabulary.vocab_size
        batches_lib.check_vocabulary(fingerprint, num_ids, model.config.vocab_size, model.directory)

    def vocabulary_file(self) -> str | None:
        """The SentencePiece file of the task, None for bytes or a cache."""
        if self.task is None:
            return None
        from coda_jax import data

        return getattr(data.task_vocabulary(self.task), "sentencepiece_model_file", None)


def train(
    directory: str,
    model: LoadedModel,
    data: Data,
    options: training.TrainOptions,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    eval_data: Data | None = None,
    z_loss: float = 0.0,
    best_rq: BestRQConfig | None = None,
    export_dtype: Any = None,
) -> tuple[LoadedModel, dict[str, float]]:
    """`coda train`: trains and exports into `directory`/export what `load_model` reads.

    Training all leaves exports the dense model in Hugging Face layout; a model with adapters
    exports them into its folder `adapter`. Where all leaves were trained, they are exported, and
    returned, as `export_dtype` if that is given; a frozen leaf always stays what it was.

    With `best_rq`, a speech encoder is pretrained on the task's audio alone: the targets, and so
    their vocabulary, do not matter.

    Returns:
        The trained model and the metrics of its evaluation.
    """
    if not data.exists:
        raise ValueError("there is nothing to train on: name a task or a cache file")
    if eval_data is not None and not eval_data.exists:
        eval_data = None
    if best_rq is None:
        for read in filter(None, (data, eval_data)):
            read.check_vocabulary(model)
    trained_model, params = _objective(model, z_loss, best_rq)
    params, metrics = training.train(
        trained_model,
        params,
        data.batches(model.config, repeat=True),
        options=options,
        optimizer=optimizer,
        learning_rate=learning_rate,
        directory=directory,
        run={
            "model": {"family": model.config.family, **_as_json(model.config)},
            "base": fingerprint(model.params),
            "data": _as_json(data),
            "best_rq": best_rq and _as_json(best_rq),
            "trained": options.trained,
            "accumulation": options.accumulation,
            "seed": options.seed,
        },
        eval_batches=eval_data and (lambda: eval_data.batches(model.config, repeat=False)),
    )
    _, params = params_lib.split(params, params_lib.PRETRAINING)
    if options.trained == "all" and export_dtype is not None:
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(export_dtype)), params)
    model = dataclasses.replace(model, params=params)
    export = pathlib.Path(directory) / "export"
    _export(export, model, options.trained, data.vocabulary_file())
    report = json.dumps(metrics, indent=2)
    write_atomically(pathlib.Path(directory) / "metrics.json", report + "\n")
    print(f"exported to {export}: {report}")
    return model, metrics


def _objective(
    model: LoadedModel, z_loss: float, best_rq: BestRQConfig | None
) -> tuple[models.Model, Mapping[str, Any]]:
    """What is trained: its loss, and the parameters to start from."""
    if best_rq is None:
        return models.for_config(model.config, z_loss), model.params
    if z_loss:
        raise ValueError(f"BEST-RQ has no z-loss: z_loss={z_loss}")
    pretrained = BestRQ(model.config, best_rq)
    return pretrained, pretrained.add_head(model.params)


def _export(
    folder: pathlib.Path, model: LoadedModel, trained: str, vocabulary_file: str | None
) -> None:
    """Writes what was trained; a vocabulary beside the checkpoint goes before the task's file."""
    if trained == "all":
        dense, _ = params_lib.split_new(model.params)
        checkpoints.save_hf(folder, model.config.dense(), dense)
        if model.directory is not None and (model.directory / batches_lib.VOCABULARY_NAME).exists():
            vocabulary_file = model.directory / batches_lib.VOCABULARY_NAME
        if vocabulary_file is not None:
            shutil.copy(vocabulary_file, folder / batches_lib.VOCABULARY_NAME)
    if model.config.adapter or model.config.coda:
        checkpoints.save_adapter(folder / "adapter", model.params, model.config)


def _as_json(config: Any) -> Any:
    """A configuration as JSON values; dtypes by name."""
    values = dataclasses.asdict(config)
    if "dtype" in values:
        values["dtype"] = jnp.dtype(values["dtype"]).name
    return values


def cache(
    task: str,
    output: str,
    feature_lengths: Mapping[str, int],
    split: str = "train",
    seed: int = 0,
    num_epochs: int = 1,
) -> None:
    """`coda cache`: a task's tokenised examples in one npz file, to train without TensorFlow."""
    from coda_jax import data

    data.cache_task(
        task, split, output, feature_lengths=feature_lengths, seed=seed, num_epochs=num_epochs
    )
