"""What a trainer needs of a model: its loss and its scores, on batches of numpy arrays.

Axis letters: B batch, N input tokens, T target tokens, D embedding, V vocabulary.
The encoder's inputs are [B, N] token ids, or [B, N, C] vectors: whatever the config's family takes.
"""

from collections.abc import Mapping, Sequence
import copy
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from coda_jax.data.examples import Expected
from coda_jax.methods import Method
from coda_jax.methods.cross_attention import reads_selected
from coda_jax.models import ModelConfig, family_of, init_params
from coda_jax.nn.tokens import Selection, selections
from coda_jax.objectives.generation import Generation
from coda_jax.objectives.own_leaves import OwnLeaves

Batch = dict[str, Array]
NOT_FINITE = -1  # every token of an output that was made of a logit that is not finite


@flax.struct.dataclass
class Sums:
    """Sums over a batch; those of several batches add up.

    Attributes:
        loss: of the target tokens' losses, weighted.
        weight: of the target tokens' weights.
        correct: of the weighted target tokens whose most probable token is right.
        exact: of the targets all of whose tokens are most probable, that is, of the examples that
            greedy decoding gets right to the last token (unpacked batches).
        examples: number of examples (segments, where rows are packed).
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    exact: Float[Array, ""]
    examples: Float[Array, ""]


class Metric(NamedTuple):
    """A mean that is reported of sums.

    Attributes:
        total: the field of `Sums` that is divided.
        count: the one by which.
        better: "max" where more is better, or "min".
    """

    total: str
    count: str
    better: str

    def of(self, sums: Sums) -> float:
        """The mean."""
        return float(getattr(sums, self.total) / jnp.maximum(getattr(sums, self.count), 1))


LOSS = Metric("loss", "weight", "min")


def unanswered(
    tokens: Int[Array, "*b l"], scores: Float[Array, "*b"]
) -> tuple[Int[Array, "*b l"], Float[Array, "*b"]]:
    """Outputs and scores, without the tokens of those whose score is NaN; see `Model.generate`."""
    return jnp.where(jnp.isnan(scores)[..., None], NOT_FINITE, tokens), scores


class Model:
    """A model that is trained for one objective; each adds `loss`, most `logits` and `generate`.

    Attributes:
        name: of the objective, in `OBJECTIVES` and in gin files.
        creates: patterns of the leaves that the objective adds to the network's; they are trained,
            and in no checkpoint that is exported.
        describes: whether its outputs are described as labels or numbers, not generated as tokens.
        reads_targets: whether the loss reads a batch's targets.
        logits_read_targets: whether the logits do, too.
        metrics: what is reported of sums, by name.
        config: the model's configuration; it decides the family.
        module: its network.

    Raises:
        ValueError: the family's configs cannot be trained for the objective.
    """

    name: ClassVar[str]
    creates: ClassVar[tuple[str, ...]] = ()
    describes: ClassVar[bool] = False
    reads_targets: ClassVar[bool] = True
    logits_read_targets: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": LOSS,
        "token_accuracy": Metric("correct", "weight", "max"),
        "exact_match": Metric("exact", "examples", "max"),
    }

    def __init__(self, config: ModelConfig):
        allowed = family_of(config).objectives(config)
        if self.name not in allowed:
            raise ValueError(
                f"objective {self.name!r} is not for such a {config.family!r}; it may be {allowed}"
            )
        self.config = config
        self.module = config.network()

    @property
    def options(self) -> dict[str, Any]:
        """What differs from run to run beside the config, as JSON."""
        return {}

    @property
    def needs_rng(self) -> bool:
        """Whether the loss draws random numbers in training."""
        return self.config.dropout_rate > 0 or any(m.needs_rng for m in self.config.methods)

    @property
    def expects(self) -> Expected:
        """What examples it can learn."""
        _, _, *channels = self.config.input_spec(1, 1).shape
        targets = "numbers" if self.describes else "tokens"
        return Expected(
            vocab_size=self.config.vocab_size,
            channels=channels[0] if channels else None,
            targets=targets if self.reads_targets else None,
            eos_id=self.config.eos_id,
            misfit=self.misfit,
            misplaced=self.config.misplaced,
        )

    def misfit(self, inputs: np.ndarray, targets: np.ndarray) -> str | None:
        """Why an example cannot be learned, one by one [N, ...] and [T]; None where it can."""
        del inputs, targets

    def longest_output(self, inputs: int) -> int | None:
        """The most tokens that so many inputs can give; by default there is no such limit."""
        del inputs

    def is_cut(
        self, tokens: Int[np.ndarray, "b l"], generation: Generation
    ) -> Bool[np.ndarray, "b"]:
        """Which outputs [B, L] reach the limit without an end, [B]."""
        written = tokens[:, len(generation.decoder_prefix or ()) :]
        unended = (written != self.config.eos_id).all(-1)
        if generation.stop_strings:  # behind which there is padding
            unended &= written[:, -1] != self.config.pad_id
        return unended

    def init(self, rng: Array) -> dict[str, Any]:
        """Random parameters."""
        return init_params(self.config, rng)

    def add_leaves(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The network's parameters with the objective's own leaves; by default there are none."""
        return params

    def loss(
        self, params: Mapping[str, Any], batch: Batch, rng: Array | None = None
    ) -> tuple[Float[Array, ""], Sums]:
        """The sum of the weighted losses, and the sums; with dropout where an RNG is given."""
        return self.loss_of(self.logits(params, batch, rng), batch)

    def logits(self, params: Mapping[str, Any], batch: Batch, rng: Array | None = None) -> Array:
        """What the loss is made of, [..., V] float32; with dropout where an RNG is given."""
        raise NotImplementedError

    def loss_of(self, logits: Array, batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """The sum of the weighted losses of logits, and the sums."""
        raise NotImplementedError

    def logit_weights(self, batch: Batch) -> Float[Array, "..."]:
        """The weights [...] of the distributions that `logits` holds [..., V].

        Raises:
            ValueError: always, unless an objective says otherwise.
        """
        del batch
        raise ValueError(f"objective {self.name!r} has no distributions that a teacher could give")

    def with_methods(self, methods: Sequence[Method]) -> "Model":
        """The same model with other methods."""
        other = copy.copy(self)
        other.config = self.config.replace(methods=tuple(methods))
        other.module = other.config.network()
        return other

    def with_own_leaves(self) -> "Model":
        """The same model, each row of which has its own trained leaves.

        In its parameters these have an axis of rows in front, [B, ...]; see `OwnLeaves`.
        """
        other = copy.copy(self)
        other.module = OwnLeaves(self.module)
        return other

    def report(self, sums: Sums) -> dict[str, float]:
        """The metrics of sums."""
        return {name: metric.of(sums) for name, metric in self.metrics.items()}

    def check_generation(self, options: Generation) -> None:
        """Checks that the model can generate so.

        Args:
            options: resolved.

        Raises:
            ValueError: it cannot; the option is named.
        """
        raise NotImplementedError

    def check_places(self, encoder_input_tokens: Any) -> None:
        """Raises ValueError for inputs, [B, N] or [B, N, C], that the model has no tables for.

        Of arrays that are known: of those of a program that is traced, outputs say it, as NaN.
        """
        if isinstance(encoder_input_tokens, jax.core.Tracer):
            return
        if not getattr(encoder_input_tokens, "is_fully_addressable", True):
            return  # other processes hold a part of it
        inputs, size = np.asarray(encoder_input_tokens), self.config.vocab_size
        if inputs.ndim == 2 and inputs.size and not 0 <= inputs.min() <= inputs.max() < size:
            wrong = inputs.min() if inputs.min() < 0 else inputs.max()
            raise ValueError(f"its inputs have the id {wrong}, the model's are 0 to {size - 1}")
        for row, values in enumerate(inputs if inputs.ndim > 2 else ()):
            # Rows of padding alone fill a batch up.
            if values[..., 0].any() and (why := self.config.misplaced(values)):
                raise ValueError(f"row {row} of the inputs: {why}")

    def generate(
        self, params: Mapping[str, Any], encoder_input_tokens, generation: Generation
    ) -> tuple[Int[Array, "b n l"], Float[Array, "b n"]]:
        """Outputs [B, n, L], the best first, and their scores [B, n].

        Where a logit is not finite there is no answer: the score is NaN, and every token is
        `NOT_FINITE`, which is in no vocabulary.

        Args:
            params: the parameter tree.
            encoder_input_tokens: [B, N] or [B, N, C].
            generation: the options.
        """
        raise NotImplementedError

    def log_probs(
        self,
        tokens: Int[np.ndarray, "b n l"],
        scores: Float[np.ndarray, "b n"],
        generation: Generation,
        stops: Array | None = None,
    ) -> Float[np.ndarray, "b n"]:
        """The log-probabilities of outputs; by default the scores that `generate` gave them."""
        del tokens, generation, stops
        return scores

    def stepwise(self, generation: Generation):
        """Generation token by token; see `Seq2Seq`.

        Raises:
            ValueError: the objective's outputs do not come so.
        """
        del generation
        raise ValueError(f"the outputs of objective {self.name!r} do not come token by token")

    def score_targets(self, params: Mapping[str, Any], encoder_input_tokens, tree):
        """The log-probabilities of whole targets; see `Seq2Seq`.

        Raises:
            ValueError: the objective has none.
        """
        del params, encoder_input_tokens, tree
        raise ValueError(f"objective {self.name!r} has no probabilities of a list of targets")

    def predict(self, params, encoder_input_tokens, **options) -> Int[Array, "b l"]:
        """The best output of each input, [B, max_decode_length] tokens, then padding.

        Args:
            params: the parameter tree.
            encoder_input_tokens: [B, N] or [B, N, C].
            **options: those of `Generation`, such as `max_decode_length` and `num_beams`.
        """
        return self.generate(params, encoder_input_tokens, Generation(**options))[0][:, 0]

    def _apply(self, params, inputs, dropout_rng, **kwargs):
        """The network's output, with dropout where an RNG is given."""
        return self.module.apply(
            {"params": params},
            *inputs,
            **kwargs,
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )

    def encode(self, params, encoder_input_tokens) -> Float[Array, "b n d"]:
        """The encoder's output of every token, [B, N, D], without dropout."""
        return self._encode(params, encoder_input_tokens)

    def _encode(self, params, encoder_input_tokens, dropout_rng=None):
        every = {"every_token": True} if reads_selected(self.config) else {}
        return self._apply(params, [encoder_input_tokens], dropout_rng, method="encode", **every)

    def encode_selecting(
        self, params, encoder_input_tokens
    ) -> tuple[Float[Array, "b n d"], dict[str, Selection]]:
        """What a decoder reads of the encoding, and {layer: what it works on} where one routes."""
        encoded, variables = self.module.apply(
            {"params": params},
            encoder_input_tokens,
            enable_dropout=False,
            method="encode",
            mutable=["intermediates"],
        )
        return encoded, selections(variables.get("intermediates", {}))

    def routing(self, params, encoder_input_tokens) -> Float[Array, "layers b n"]:
        """The weight with which each encoder layer takes each token, 0 where it does not.

        A layer without a router, or with r = 1, takes every token with weight 1.
        """
        _, found = self.encode_selecting(params, encoder_input_tokens)
        every_token = self.module.input_mask(encoder_input_tokens).astype(jnp.float32)
        rows = jnp.arange(every_token.shape[0])[:, None]

        def weights(layer):
            if layer not in found:
                return every_token
            selection = found[layer]
            return jnp.zeros_like(every_token).at[rows, selection.indices].set(selection.weights)

        return jnp.stack([weights(f"layers_{i}") for i in range(self.config.num_encoder_layers)])
