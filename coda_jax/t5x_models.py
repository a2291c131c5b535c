"""T5X's side: its model class with metrics of the routing, what it restores, what it trains.

The network is the config's own. The only module that imports t5x. Its functions are named in
gin_configs/t5x.
"""

from collections.abc import Callable, Sequence
import copy
import dataclasses
import functools
import importlib
import typing
from typing import Any

import clu.metrics
from flax import linen as nn
import jax
import jax.numpy as jnp
import optax
from t5x import decoding, gin_utils, models, optimizers

from coda_jax import checks, trees
from coda_jax.checkpoints.t5x import table_of
from coda_jax.checkpoints.t5x_record import has_checkpoints, run_folder, write_record
from coda_jax.commands.check import NEW_LEAVES, check_leaves, compare_leaves
from coda_jax.commands.configuration import check_flags_of_t5x
from coda_jax.commands.t5x_identity import check_restored, check_resumed
from coda_jax.methods import Method, trained
from coda_jax.models import ModelConfig, param_shapes
from coda_jax.nn.tokens import selections
from coda_jax.objectives import Generation
from coda_jax.objectives.seq2seq import Z_LOSS


def adapted(
    config: ModelConfig,
    methods: Sequence[Method],
    dtype: Any = "float32",
    dropout_rate: float = 0.0,
) -> ModelConfig:
    """The config of a run: a preset with methods, dtype of the computation and dropout.

    Raises:
        ValueError: there is no config: a T5X checkpoint does not say its sizes; T5X cannot run it.
    """
    if config is None:
        raise ValueError("a run of T5X needs the sizes of its model: give a PRESET")
    if config.pad_id or config.decoder_start_id:
        raise ValueError(
            f"T5X pads with token 0 and starts decoders from it: pad_id={config.pad_id}, "
            f"decoder_start_id={config.decoder_start_id}; train it with `coda train`"
        )
    if not config.num_decoder_layers:
        raise ValueError("T5X trains encoder-decoders: num_decoder_layers=0; use `coda train`")
    return config.replace(methods=tuple(methods), dtype=dtype, dropout_rate=dropout_rate)


def network(config: ModelConfig) -> nn.Module:
    """The network of a config, as T5X's `module`.

    Raises:
        UsageError: of what was given on T5X's command line, something has no effect.
    """
    check_flags_of_t5x()
    return config.network()


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


def restoration(config: ModelConfig, new_leaves: str = "created") -> Callable:
    """What of a checkpoint T5X restores: one of its `state_transformation_fns`.

    These see the table of leaves of every checkpoint, wherever it lies. T5X itself would start
    parameters that are missing from scratch, and drop those that the model lacks. Of shapes orbax's
    table says nothing: Flax compares those, before the first step.

    Args:
        config: the run's.
        new_leaves: whether the methods' leaves are "created" or "restored", unless T5X goes on with
            its own run, whose leaves are all restored.

    Returns:
        (a checkpoint's state, the run's state) -> what is restored: the parameters, which are
        compared with the model's, and the step; the optimizer starts anew.

    Raises:
        ValueError: `new_leaves` is another word.
    """
    checks.OneOf(NEW_LEAVES)("NEW_LEAVES", new_leaves)

    def restored(state, _, is_resuming=False):
        shapes = table_of(state.get("target", {}))
        compare_leaves(config, shapes, "the checkpoint", "restored" if is_resuming else new_leaves)
        if is_resuming:
            return state
        kept = {name: leaf for name, leaf in state["state"].items() if name != "param_states"}
        return {**state, "state": kept}

    return restored


def beam_search(alpha: float = 0.6) -> Callable:
    """T5X's `decode_fn` of this length penalty.

    Raises:
        ValueError: it is out of its range.
    """
    given = Generation(num_beams=2, alpha=alpha)
    return functools.partial(decoding.beam_search, alpha=given.alpha)


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
    """T5X's encoder-decoder model, which checks its checkpoint and logs how each layer routes.

    Args:
        checkpoint: where the run starts from. Where it has the methods' leaves, its run's methods
            are compared with the model's; the leaves of one on a local disk are compared here
            already, so that what does not fit is said at once.
        new_leaves: whether the methods' leaves are "created" or "restored".
        model_dir: the folder of a training, in which T5X goes on where it has checkpoints; None for
            evaluation and inference.
        change_methods: whether the checkpoint is used with other methods than its run's.
        *args: T5X's.
        **kwargs: T5X's.

    Raises:
        ValueError: leaves are missing, extra or misshapen (all are listed); a run was another one;
            a value is out of its range.
    """

    def __init__(
        self,
        *args,
        checkpoint: str | None = None,
        new_leaves: str = "created",
        model_dir: str | None = None,
        change_methods: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        Z_LOSS("Z_LOSS", self._z_loss)
        checks.Number(least=0, below=1)("LABEL_SMOOTHING", self._label_smoothing)
        if not isinstance(self._loss_normalizing_factor, str | None):  # T5X checks the text
            factor = checks.Number(above=0)
            factor("LOSS_NORMALIZING_FACTOR", self._loss_normalizing_factor)
        checks.COUNT("DecoderParams.num_decodes", self._default_decoder_params.num_decodes)
        checks.flag("CHANGE_METHODS", change_methods)
        config = self.module.config
        if model_dir is not None and has_checkpoints(run_folder(model_dir)):
            check_resumed(model_dir, config)
        elif checkpoint is not None:
            if new_leaves == "restored":
                goes_on = "evaluated" if model_dir is None else "trained on"
                check_restored(checkpoint, config, goes_on, change_methods)
            if "://" not in checkpoint:
                check_leaves(config, checkpoint, new_leaves)

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


def summarize_config(model_dir: str, summary_writer: Any, step: int, config: ModelConfig) -> None:
    """T5X's `summarize_config_fn`, which also says in the run's folder what its model is.

    Args:
        model_dir: T5X's, as are the next two.
        summary_writer: of TensorBoard, or None.
        step: of the start.
        config: the run's.
    """
    gin_utils.summarize_gin_config(model_dir, summary_writer, step)
    if jax.process_index() == 0:
        write_record(run_folder(model_dir), config)


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


def partial_optimizer(
    optimizer: optax.GradientTransformation, config: ModelConfig
) -> optimizers.OptaxWrapper:
    """Trains what the methods train; the rest keeps its bits and has no optimizer state.

    Args:
        optimizer: of the trained parameters, with its learning rate: T5X's trainer sets none.
        config: the run's, with its methods, whose own parts of a step are put around it.

    Returns:
        The optimizer definition for a T5X model.
    """
    for method in config.methods:
        optimizer = method.wrap_optimizer(optimizer)

    def labels(params):
        return trees.labels(params, trained(config))

    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optimizers.OptaxWrapper(optax.multi_transform(transforms, labels))
