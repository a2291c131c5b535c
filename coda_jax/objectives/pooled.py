"""Classification and regression by a head on the pooled outputs of an encoder alone.

A target is one number: that of the class among the config's `labels`, or the value itself.

Axis letters: B batch, N input tokens, C classes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import optax

from coda_jax.models import ModelConfig
from coda_jax.objectives.base import LOSS, Batch, Metric, Model, Sums
from coda_jax.objectives.generation import Generation


class Pooled(Model):
    """Base of `Classification` and `Regression`.

    Raises:
        ValueError: the config's head is for another objective.
    """

    describes: ClassVar[bool] = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if config.head != self.name:
            raise ValueError(f"objective {self.name!r} needs a head for it, got {config.head!r}")

    def logits(self, params, batch: Batch, dropout_rng: Array | None = None):
        """What the head gives, [B, C] or [B, 1] float32; with dropout where an RNG is given.

        Raises:
            ValueError: the batch is packed.
        """
        if "encoder_segment_ids" in batch:
            raise ValueError("packed examples are not pooled one by one: pack=False")
        return self._apply(params, [batch["encoder_input_tokens"]], dropout_rng)

    def loss_of(self, outputs: Float[Array, "b c"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """The sum of the examples' losses, and the sums; an example's target is one number.

        The loss is NaN where anything that the head gives is not finite.

        Args:
            outputs: of the head, [B, C] or [B, 1].
            batch: encoder_input_tokens [B, N]; decoder_target_tokens and decoder_loss_weights
                [B, 1].
        """
        weights = batch["decoder_loss_weights"][:, 0].astype(jnp.float32)
        losses, right = self._scores(outputs, batch["decoder_target_tokens"][:, 0])
        losses = jnp.where(jnp.isfinite(outputs).all(-1), losses, jnp.nan)
        count, correct = weights.sum(), (right * weights).sum()
        sums = Sums((losses * weights).sum(), count, correct, correct, count)
        return sums.loss, sums

    def _scores(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        """Losses [B], and what is summed as right [B]."""
        raise NotImplementedError

    def predict(self, params, encoder_input_tokens) -> Float[Array, "b c"]:
        """What the head gives, [B, C] or [B, 1] float32, without dropout."""
        return self.logits(params, {"encoder_input_tokens": encoder_input_tokens})

    def read(self, params, encoded, encoder_input_tokens) -> Float[Array, "b c"]:
        """The same of outputs of the encoder [B, N, D] and their inputs [B, N]."""
        return self._apply(params, [encoded, encoder_input_tokens], None, method="read")

    def check_generation(self, options: Generation) -> None:
        """Raises ValueError: nothing is generated."""
        raise ValueError(
            f"{self.name} gives labels or numbers, not tokens: see inference.Encodings"
        )

    def describe(self, outputs: Float[np.ndarray, "c"]) -> dict[str, Any]:
        """What `coda predict` writes of the outputs [C] of one input."""
        raise NotImplementedError


class Classification(Pooled):
    """The cross-entropy of the labels."""

    name: ClassVar[str] = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": LOSS,
        "accuracy": Metric("exact", "examples", "max"),
    }

    def logit_weights(self, batch: Batch) -> Float[Array, " b"]:
        """The weights of the examples."""
        return batch["decoder_loss_weights"][:, 0].astype(jnp.float32)

    def _scores(self, outputs, targets):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        return losses, outputs.argmax(-1) == targets

    def describe(self, outputs: Float[np.ndarray, "c"]) -> dict[str, Any]:
        """The label as "prediction", and the probabilities of all as "scores"."""
        probabilities = np.exp(outputs - outputs.max())
        probabilities /= probabilities.sum()
        scores = dict(zip(self.config.labels, probabilities.tolist(), strict=True))
        return {"prediction": self.config.labels[outputs.argmax()], "scores": scores}


class Regression(Pooled):
    """The squared error of one number."""

    name: ClassVar[str] = "regression"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": LOSS,
        "mean_absolute_error": Metric("exact", "examples", "min"),
    }

    def _scores(self, outputs, targets):
        errors = outputs[:, 0] - targets
        return errors**2, jnp.abs(errors)

    def describe(self, outputs: Float[np.ndarray, "c"]) -> dict[str, Any]:
        """The number as "prediction"."""
        return {"prediction": float(outputs[0])}


class Embedding(Model):
    """An encoder alone whose outputs are what is asked for; it is not trained."""

    name: ClassVar[str] = "embedding"

    def check_generation(self, options: Generation) -> None:
        """Raises ValueError: nothing is generated."""
        raise ValueError(
            "an encoder alone answers with its outputs, EMBED='mean' or 'tokens', or with the head "
            "of an adapter"
        )

    def loss(self, params, batch: Batch, dropout_rng: Array | None = None):
        """Raises ValueError: there is nothing to compare with a target."""
        raise ValueError("an encoder alone is trained with a head: see tasks/labels.gin")
