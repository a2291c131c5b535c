"""T5X's side: its model class, which trains what the methods train, and its trainer, which checks.

The only module that imports t5x; what a run of it needs beside T5X's classes is `commands.t5x_run`.
Its functions are named in gin_configs/t5x.
"""

from collections.abc import Callable, Mapping
import copy
import dataclasses
import functools
import importlib
import math
import typing
from typing import Any

import clu.metrics
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax
import seqio
from t5x import decoding, gin_utils, models, optimizers, trainer, utils

from coda_jax import checks, trees
from coda_jax.checkpoints.t5x_record import run_folder, write_record
from coda_jax.commands.configuration import check_rate_of_t5x, register_methods
from coda_jax.commands.t5x_data import record_data
from coda_jax.data.seqio_agreement import agreed, check_vocabularies
from coda_jax.data.seqio_converters import TokensFeatureConverter, VectorsFeatureConverter
from coda_jax.methods import Method, check_packs, max_segments, partition, trained
from coda_jax.models import ModelConfig, param_shapes
from coda_jax.nn.tokens import selections
from coda_jax.objectives import Generation
from coda_jax.objectives.seq2seq import Z_LOSS
from coda_jax.training.partial_optimizer import PartialOptimizer, steps_taken
from coda_jax.training.preemption import StopsOnRequest
from coda_jax.training.run_directory import Interruption

register_methods()  # before T5X reads gin files


def example_network(config: ModelConfig) -> nn.Module | None:
    """T5X's own network of a dense config's sizes, to be compared with; None where it has none.

    Args:
        config: without methods.
    """
    theirs = importlib.import_module("t5x.examples.t5.network").Transformer
    sizes = typing.get_type_hints(theirs)["config"]
    names = [field.name for field in dataclasses.fields(sizes)]
    if len(config.input_spec(1, 1).shape) != 2 or not all(hasattr(config, x) for x in names):
        return None
    network = theirs(sizes(**{name: getattr(config, name) for name in names}))
    init = functools.partial(network.init, enable_dropout=False)
    made = jax.eval_shape(init, jax.random.key(0), *config.init_inputs())["params"]
    made, ours = (
        {path: leaf.shape for path, leaf in trees.flatten(tree).items()}
        for tree in (made, param_shapes(config))
    )
    return network if made == ours else None


def feature_converter(
    config: ModelConfig, pack: bool = True, **kwargs: Any
) -> seqio.FeatureConverter:
    """T5X's feature converter for a model: packed rows hold what its methods can keep apart.

    Args:
        config: the run's.
        pack: whether examples share rows.
        **kwargs: seqio's.

    Raises:
        ValueError: `pack`, where a method or the inputs do not allow it.
    """
    check_packs(config.methods if pack else ())
    if len(config.input_spec(1, 1).shape) > 2:
        return VectorsFeatureConverter(pack=pack, **kwargs)
    return TokensFeatureConverter(max_segments(config.methods), pack=pack, **kwargs)


def beam_search(alpha: float = 0.6) -> Callable:
    """T5X's `decode_fn` of this length penalty; with one beam it is greedy.

    Raises:
        ValueError: it is out of its range.
    """
    given = Generation(num_beams=2, alpha=alpha)
    return functools.partial(_search, alpha=given.alpha)


@functools.wraps(decoding.beam_search)  # T5X looks at the signature
def _search(*args, num_decodes, alpha, **kwargs):
    if num_decodes > 1:
        return decoding.beam_search(*args, num_decodes=num_decodes, alpha=alpha, **kwargs)
    # T5X's search with one beam is not greedy: behind the likeliest token, if that ends the output,
    # it follows the second, and prefers that output if the penalty of its length says so.
    return decoding.temperature_sample(*args, temperature=0.0, rescale_log_probs=False, **kwargs)


def temperature_sample(temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0) -> Callable:
    """T5X's `decode_fn` that draws.

    Args:
        temperature: the logits are divided by it.
        top_k: draw from so many most probable tokens; 0 for all.
        top_p: draw from the fewest tokens that have this probability together; 0 for all.

    Raises:
        ValueError: a value is out of its range.
    """
    given = Generation(temperature=temperature, top_k=top_k, top_p=top_p)
    return functools.partial(
        decoding.temperature_sample,
        temperature=given.temperature,
        topk=given.top_k,
        topp=given.top_p,
    )


class CodaEncoderDecoderModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder model, which checks what it is given and logs how each layer routes.

    Whatever the optimizer, it trains what the methods train; see `for_what_is_trained`.

    Args:
        module: the network, whose config is the run's.
        input_vocabulary: of texts, or a `seqio.PassThroughVocabulary` for other inputs.
        output_vocabulary: of the targets.
        *args: T5X's.
        task: T5X's MIXTURE_OR_TASK_NAME, which must have these vocabularies. Its own, which may
            lack extra ids, take their place: T5X compares them with `==`.
        task_module: T5X's MIXTURE_OR_TASK_MODULE.
        **kwargs: T5X's.

    Raises:
        ValueError: a vocabulary is not that of the model or of the task; there is no such task; the
            optimizer cannot serve; a value is out of its range.
    """

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        *args,
        task: Any = None,
        task_module: str | None = None,
        **kwargs,
    ):
        config, vocabularies = module.config, (input_vocabulary, output_vocabulary)
        check_vocabularies(config, *vocabularies)
        vocabularies = agreed(task, task_module, *vocabularies)
        super().__init__(module, *vocabularies, *args, **kwargs)
        if self.optimizer_def is not None:
            self.optimizer_def = for_what_is_trained(self.optimizer_def, config)
        if kwargs.get("feature_converter_cls") is None:
            self.FEATURE_CONVERTER_CLS = functools.partial(feature_converter, config)
        Z_LOSS("Z_LOSS", self._z_loss)
        checks.Number(least=0, below=1)("LABEL_SMOOTHING", self._label_smoothing)
        if not isinstance(self._loss_normalizing_factor, str | None):  # T5X checks the text
            factor = checks.Number(above=0)
            factor("LOSS_NORMALIZING_FACTOR", self._loss_normalizing_factor)
        checks.COUNT("DecoderParams.num_decodes", self._default_decoder_params.num_decodes)

    def loss_fn(self, params, batch, dropout_rng):
        """T5X's loss and metrics, and those of `routing_metrics`, from one pass; see T5X."""
        intermediates = {}
        plain = copy.copy(self)

        def compute_logits(params, batch, dropout_rng):
            logits, variables = self._compute_logits(
                params, batch, dropout_rng, mutable=["intermediates"]
            )
            intermediates.update(variables.get("intermediates", {}))
            return logits

        plain._compute_logits = compute_logits
        loss, metrics = models.EncoderDecoderModel.loss_fn(plain, params, batch, dropout_rng)
        num_tokens = jnp.sum(self.module.input_mask(batch["encoder_input_tokens"]))
        return loss, {**metrics, **routing_metrics(intermediates, num_tokens)}


def summarize_config(
    model_dir: str,
    summary_writer: Any,
    step: int,
    config: ModelConfig,
    data: Mapping[str, Any],
    base: Callable[[], Mapping[str, str] | None] = lambda: None,
) -> None:
    """T5X's `summarize_config_fn`, which also says in the run's folder what model and data are.

    Args:
        model_dir: T5X's, as are the next two.
        summary_writer: of TensorBoard, or None.
        step: of the start.
        config: the run's.
        data: the `identity` of the run's.
        base: gives the fingerprints of the leaves that are not saved, if any.
    """
    gin_utils.summarize_gin_config(model_dir, summary_writer, step)
    if jax.process_index() == 0:
        write_record(run_folder(model_dir), config, base())
        record_data(model_dir, data, step)


def routing_metrics(intermediates: Any, num_tokens: jax.Array) -> dict[str, clu.metrics.Average]:
    """Means over a batch's tokens, for each layer that has a router.

    Args:
        intermediates: what the network sowed; without routers there are no metrics.
        num_tokens: [] the tokens of the batch that are not padding.

    Returns:
        For layer N, "routing/layers_N/share" of the tokens that are routed, and of those the mean
        "routing/layers_N/weight" lam and "routing/layers_N/entropy",
        -lam ln lam - (1 - lam) ln(1 - lam): 0 where the router is sure, ln 2 where it wavers.
    """
    metrics = {}
    for name, selection in selections(intermediates).items():
        weights = selection.weights
        count = jnp.sum(selection.valid)
        # The weight of an empty slot is 0, and so is its entropy.
        entropy = jax.scipy.special.entr(weights) + jax.scipy.special.entr(1 - weights)
        for metric, total, over in (
            ("share", count, num_tokens),
            ("weight", jnp.sum(weights), count),
            ("entropy", jnp.sum(entropy), count),
        ):
            metrics[f"routing/{name}/{metric}"] = clu.metrics.Average(
                total=total.astype(jnp.float32), count=over.astype(jnp.int32)
            )
    return metrics


def for_what_is_trained(
    optimizer: optimizers.OptimizerDef | optax.GradientTransformation, config: ModelConfig
) -> PartialOptimizer:
    """Trains what the methods train; the rest keeps its bits and has no optimizer state.

    Args:
        optimizer: of T5X, or of optax with its learning rate, around which the methods' own parts
            of a step are put.
        config: the run's, with its methods.

    Returns:
        The optimizer definition for a T5X model.

    Raises:
        ValueError: nothing is trained; or the optimizer cannot serve.
    """
    if not config.methods:
        raise ValueError("nothing is trained: METHODS=()")
    if isinstance(optimizer, optimizers.MultiOptimizer):
        raise ValueError(
            "OPTIMIZER: T5X's MultiOptimizer cannot go on from its checkpoints; "
            "optax.multi_transform can"
        )
    if isinstance(optimizer, optimizers.OptaxWrapper):
        optimizer = optimizer.optax_optimizer
    own = [m.name for m in config.methods if type(m).wrap_optimizer is not Method.wrap_optimizer]
    if isinstance(optimizer, optax.GradientTransformation):
        check_rate_of_t5x()
        for method in config.methods:
            optimizer = method.wrap_optimizer(optimizer)
        optimizer = optimizers.OptaxWrapper(optimizer)
    elif own:
        raise ValueError(
            f"OPTIMIZER: the methods {own} have a part in each step, which needs an optimizer of "
            f"optax, not T5X's {type(optimizer).__name__}"
        )
    return PartialOptimizer(optimizer, trained(config))


class Stopped(trainer.PreemptionError, Interruption):
    """The run was asked to stop, and T5X has saved its state."""


def checked_trainer(trainer_cls: type[trainer.Trainer]) -> type[trainer.Trainer]:
    """The class of trainers with the true rate in its log, which ends at what is not finite.

    It also ends where it is asked to, see `StopsOnRequest`; T5X then saves its state.

    Args:
        trainer_cls: T5X's, with what gin files give it.
    """
    return type("CheckedTrainer", (_Checked, StopsOnRequest, trainer_cls), {"stopped": Stopped})


@jax.jit
def _finite(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}


class _Checked:
    """What `checked_trainer` puts before T5X's trainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        count = steps_taken(self.train_state.param_states)
        if count is not None:  # optax starts at 0 where T5X's step goes on from the checkpoint's
            step, count = (int(utils.get_local_data(x)) for x in (self.train_state.step, count))
            rate = self._learning_rate_fn
            self._learning_rate_fn = lambda now: rate(now - (step - count))

    def train(self, batch_iter, num_steps, start_step=None):
        """Trains as T5X does, see there; FloatingPointError where a loss is not finite."""
        try:
            summary = super().train(batch_iter, num_steps, start_step)
        except Stopped:
            self._check_parameters()
            raise
        last = int(utils.get_local_data(self.train_state.step))
        self._check(f"steps {last - num_steps + 1} to {last}", summary.result())
        self._check_parameters()
        return summary

    def _check_parameters(self) -> None:
        last = int(utils.get_local_data(self.train_state.step))
        found, _ = partition(self._model.module.config, self.train_state.params)
        for path, finite in jax.device_get(_finite(trees.flatten(found))).items():
            if not finite:
                raise FloatingPointError(
                    f"the parameter {path} has values that are not finite after step {last}: "
                    "nothing is saved after the last checkpoint"
                )

    def eval(self, batch_iters):
        """Evaluates as T5X does, see there; FloatingPointError where a loss is not finite."""
        summaries = super().eval(batch_iters)
        for name, summary in summaries.items():
            self._check(f"the evaluation on {name}", summary)
        return summaries

    def _check(self, what: str, summary: Mapping[str, Any]) -> None:
        loss = float(summary["loss"].value)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of {what} is {loss}: nothing is saved after the last checkpoint"
            )
