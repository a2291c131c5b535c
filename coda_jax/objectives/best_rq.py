"""BEST-RQ: pretraining of a speech encoder on audio without transcripts.

A projection and a codebook that are drawn once and never trained give each frame a target,

    target(x) = argmin_i || c_i / |c_i| - A x / |A x| ||,

and the encoder, which sees noise in the place of some spans of frames, predicts the targets of
those from what is around them. Its softmax is a head of this pretraining alone.

Axis letters: B batch, N frames, F features of a frame, C = 1 + F, D embedding, P dimensions of the
codebook, V codes.
Reference: Chiu et al. 2022, Self-supervised Learning with Random-projection Quantizer for Speech
Recognition, arXiv 2202.01855.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from coda_jax import checks
from coda_jax.models import ModelConfig
from coda_jax.nn.tokens import join_frames, split_frames
from coda_jax.objectives.base import Batch, Model, Sums

HEAD = "best_rq_head"  # its leaves beside those of the network


@dataclasses.dataclass(frozen=True)
class BestRQConfig:
    """The targets and the masking; by default the paper's, at 20 ms a frame.

    Attributes:
        num_codes: V.
        code_dim: P.
        start_probability: of a frame to be the first of a span that is masked.
        span: frames of a span; 20 are 400 ms.
        noise: standard deviation of what takes the place of masked frames.
        seed: of the projection, the codebook and the new head.
    """

    num_codes: int = 8192
    code_dim: int = 16
    start_probability: float = 0.01
    span: int = 20
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self):
        checks.fields(
            self,
            num_codes=checks.Whole(2),
            code_dim=checks.COUNT,
            start_probability=checks.Number(above=0, most=1),
            span=checks.COUNT,
            noise=checks.Number(least=0),
            seed=checks.SEED,
        )


def quantizer(
    rng: Array, feature_dim: int, code_dim: int, num_codes: int
) -> tuple[Float[Array, "f p"], Float[Array, "v p"]]:
    """The random projection A, Xavier-uniform, and the codebook, standard normal of unit length."""
    projection_rng, codebook_rng = jax.random.split(rng)
    projection = jax.nn.initializers.xavier_uniform()(projection_rng, (feature_dim, code_dim))
    return projection, _unit(jax.random.normal(codebook_rng, (num_codes, code_dim)))


def _unit(x: Float[Array, "... p"]) -> Float[Array, "... p"]:
    """x at length 1; zero stays zero."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)


def frame_targets(
    features: Float[Array, "b n f"],
    projection: Float[Array, "f p"],
    codebook: Float[Array, "v p"],
) -> Int[Array, "b n"]:
    """The nearest code of each projected frame, at length 1; of ties the first.

    Args:
        features: [B, N, F].
        projection: [F, P].
        codebook: [V, P], of unit length.

    Returns:
        [B, N] int32.
    """
    # Between vectors of unit length, the least distance is the largest product.
    return jnp.argmax(_unit(features @ projection) @ codebook.T, axis=-1).astype(jnp.int32)


def span_mask(
    starts: Bool[Array, "b n"], span: int, mask: Bool[Array, "b n"]
) -> Bool[Array, "b n"]:
    """True for the frames of the spans, which may overlap and end with the utterance.

    Args:
        starts: [B, N], where spans start.
        span: their length.
        mask: [B, N], False for padding.

    Returns:
        [B, N]; False for padding.
    """
    started = jnp.cumsum(starts, axis=-1)
    ended = jnp.pad(started, ((0, 0), (span, 0)))[:, : starts.shape[1]]
    return mask & (started > ended)


class BestRQ(Model):
    """A speech encoder, with or without adapters and routing, that is pretrained with BEST-RQ.

    What the network has on its encoder, a CTC head or a decoder, is neither used nor changed.

    Attributes:
        targets: how targets and masks are drawn.
        projection: [F, P], never trained.
        codebook: [V, P], never trained.
    """

    name: ClassVar[str] = "best_rq"
    creates: ClassVar[tuple[str, ...]] = (rf"^{HEAD}/",)
    reads_targets: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, targets: BestRQConfig = BestRQConfig()):
        super().__init__(config)
        self.targets = checks.InstanceOf(BestRQConfig)("targets", targets)
        quantizer_rng, self._head_rng, self._eval_rng = jax.random.split(
            jax.random.key(targets.seed), 3
        )
        self.projection, self.codebook = quantizer(
            quantizer_rng, config.feature_dim, targets.code_dim, targets.num_codes
        )

    @property
    def options(self) -> dict[str, Any]:
        """How targets and masks are drawn."""
        return dataclasses.asdict(self.targets)

    @property
    def needs_rng(self) -> bool:
        """True: the spans are drawn anew in each step."""
        return True

    def add_leaves(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The network's parameters with a new head, [D, V] and [V], as `HEAD`."""
        shape = (self.config.emb_dim, self.targets.num_codes)
        kernel = jax.nn.initializers.lecun_normal()(self._head_rng, shape, jnp.float32)
        return {**params, HEAD: {"kernel": kernel, "bias": jnp.zeros(shape[1:], jnp.float32)}}

    def masked(
        self, frames: Float[Array, "b n c"], rng: Array
    ) -> tuple[Float[Array, "b n c"], Bool[Array, "b n"]]:
        """The frames with noise in some spans, and which these are, [B, N].

        They depend on the RNG and on a frame's place, not on how far its row is padded.
        """
        start_rng, noise_rng = jax.random.split(rng)
        features, mask = split_frames(frames)

        def along_time(draw):
            # With N in front, longer rows only add numbers to those that shorter ones get.
            return jnp.swapaxes(draw, 0, 1)

        chances = along_time(jax.random.uniform(start_rng, mask.T.shape))
        there = span_mask(chances < self.targets.start_probability, self.targets.span, mask)
        noise = along_time(jax.random.normal(noise_rng, jnp.swapaxes(features, 0, 1).shape))
        features = jnp.where(there[..., None], self.targets.noise * noise, features)
        return join_frames(features, mask), there

    def loss(self, params, batch: Batch, rng: Array | None = None) -> tuple[Float[Array, ""], Sums]:
        """The sum of the masked frames' losses, -log p of their targets, and the sums.

        A masked frame counts as a target token, and an utterance is exact if all of its are right.

        Args:
            params: the network's parameters and those of `add_leaves`.
            batch: encoder_input_tokens [B, N, C]; targets are not read.
            rng: of the spans and of dropout; without one the spans are always the same.

        Raises:
            ValueError: the batch is packed.
        """
        if "encoder_segment_ids" in batch:
            raise ValueError("BEST-RQ is not defined for packed examples: pack=False")
        frames = batch["encoder_input_tokens"]
        features, mask = split_frames(frames)
        targets = frame_targets(features, self.projection, self.codebook)
        span_rng, dropout_rng = (
            (self._eval_rng, None) if rng is None else tuple(jax.random.split(rng))
        )
        frames, there = self.masked(frames, span_rng)
        encoded = self._encode(params, frames, dropout_rng).astype(jnp.float32)
        logits = encoded @ params[HEAD]["kernel"] + params[HEAD]["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = logits.argmax(-1) == targets
        sums = Sums(
            loss=jnp.where(there, losses, 0).sum(),
            weight=there.sum(dtype=jnp.float32),
            correct=(right & there).sum(dtype=jnp.float32),
            exact=((right | ~there).all(-1) & there.any(-1)).sum(dtype=jnp.float32),
            examples=mask.any(-1).sum(dtype=jnp.float32),
        )
        return sums.loss, sums
