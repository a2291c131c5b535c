"""T5X's side: its model class with metrics of the routing, and its optimizer of the new parameters.

The network is `network.Transformer` as it is. The only module that imports t5x.
"""

import copy
from typing import Any

from absl import logging
import clu.metrics
import jax
import jax.numpy as jnp
import optax
from t5x import models, optimizers

from coda_jax import params as param_lib
from coda_jax.check import check_leaves
from coda_jax.routing import Selection


class CodaEncoderDecoderModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder model, which checks its checkpoint and logs how each layer routes.

    Args:
        checkpoint: where the run starts from; its leaves are compared with the model's before
            anything is restored, as `coda check` does. A remote one is left unchecked, with a
            warning.
        new_leaves: whether adapters and routers are "created" or "restored".
        *args: T5X's.
        **kwargs: T5X's.

    Raises:
        ValueError: leaves are missing, extra or misshapen (all are listed).
    """

    def __init__(self, *args, checkpoint: str | None = None, new_leaves: str = "created", **kwargs):
        super().__init__(*args, **kwargs)
        if checkpoint is None:
            return
        if "://" in checkpoint:
            logging.warning("%s is remote and not checked; see `coda check`.", checkpoint)
        else:
            check_leaves(self.module.config, checkpoint, new_leaves)

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
    for name, layer in intermediates.get("encoder", {}).items():
        selection: Selection = layer["router"]["selection"][0]
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
    optimizer: optax.GradientTransformation, trained: str = "adapters"
) -> optimizers.OptaxWrapper:
    """Trains what `params.TRAINED` names; the rest keeps its bits and has no optimizer state.

    Args:
        optimizer: of the trained parameters, with its learning rate: T5X's trainer sets none.
        trained: "adapters" (adapters, routers, norms and CTC heads) or "all".

    Returns:
        The optimizer definition for a T5X model.

    Raises:
        ValueError: `trained` is another word.
    """

    def labels(params):
        return param_lib.labels(params, trained)

    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optimizers.OptaxWrapper(optax.multi_transform(transforms, labels))
