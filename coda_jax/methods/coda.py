"""CoDA: a router scores the tokens and sends k of each example through the frozen layer.

    s   = u . w_router                              one score a token, `token_scores`
    lam = soft_topk(s, k)                           k = ceil(length / r) of each example
    idx = the k largest scores, in ascending position order
    y   = x + scatter(lam[idx] * (layer(x[idx]) - x[idx]), idx)

Axis letters: B batch, N tokens, K slots (the static capacity), S segments, D embedding.
Reference: Lei et al. 2023, Conditional Adapters, section 3.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax import checks
from coda_jax.methods.base import NORMS, Layer, LayerFlops, Method, Place
from coda_jax.methods.selection import capacity, num_selected, pick_and_weigh, select
from coda_jax.methods.soft_topk import EPSILON, ITERATIONS, SOLVERS
from coda_jax.nn import one_hot
from coda_jax.nn.layers import Normalized, Vectors
from coda_jax.nn.sums import sum_in_order
from coda_jax.nn.tokens import Selection, Tokens, take

SOFT = ("soft_topk", "straight_through")  # with the weights, or the gradient, of the soft top-k
ROUTINGS = (*SOFT, "sigmoid", "truncation")
ATTENTIONS = ("k_to_k", "k_to_all")
CROSS_ATTENTIONS = ("all", "selected")
REDUCTION = checks.Number(least=1, most=1_000_000)  # as a ratio it is to fit into int32


def check_reduction(name: str, value: Any) -> float | tuple[float, ...]:
    """One number of at least 1, or one for each layer; see `checks`."""
    by_layer = isinstance(value, tuple | list)
    return checks.Each(REDUCTION, least=1)(name, value) if by_layer else REDUCTION(name, value)


@dataclasses.dataclass(frozen=True)
class Coda(Method):
    """How the encoder's layers route. A layer that is not routed to gets the residual stream alone.

    Attributes:
        reduction: r, at least 1: a layer works on ceil(length / r) tokens of each example. One
            number for all layers, or one for each; 1 is the dense layer. It changes no parameter,
            so a trained model can be run at another reduction.
        epsilon: temperature of the soft top-k.
        solver: of the soft top-k, "exact" or "iterative".
        num_iterations: steps of the iterative solver.
        attention: what selected tokens attend to: "k_to_k" (each other) or "k_to_all".
        cross_attention: what a decoder attends to: "all" tokens of the encoding, or those that the
            last encoder layer "selected", which at r = 1 are all; see `cross_attention.py`.
        routing: "soft_topk" (weights from the soft top-k of the scores), "straight_through" (weight
            1, with the gradient of the soft top-k), "sigmoid" (a picked token's weight is the
            sigmoid of its score) or "truncation" (the first k tokens with weight 1, no parameter).
        noise: standard deviation of what is added to the scores in training.
        max_segments: the most examples in a packed row; each costs a slot more.
    """

    name: ClassVar[str] = "coda"
    creates: ClassVar[tuple[str, ...]] = (r"(^|/)router/",)
    also_trains: ClassVar[tuple[str, ...]] = NORMS
    profile_scopes: ClassVar = {
        "router": ("router",),
        "gather": ("gather",),
        "scatter": ("scatter",),
    }

    reduction: float | tuple[float, ...] = 3.0
    epsilon: float = 1.0
    solver: str = "exact"
    num_iterations: int = 20
    attention: str = "k_to_k"
    cross_attention: str = "all"
    routing: str = "soft_topk"
    noise: float = 0.0
    max_segments: int = 16

    @classmethod
    def examples(cls) -> tuple["Coda", ...]:
        """Each attention, routing and solver."""
        return (
            cls(),
            cls(2.5, attention="k_to_all", max_segments=8),
            cls(2.0, routing="sigmoid"),
            cls(2.0, routing="straight_through", noise=0.5),
            cls(2.0, routing="truncation", attention="k_to_all"),
            cls(2.5, solver="iterative", epsilon=0.5),
        )

    def __post_init__(self):
        checks.fields(
            self,
            reduction=check_reduction,
            epsilon=EPSILON,
            solver=checks.OneOf(SOLVERS),
            num_iterations=ITERATIONS,
            attention=checks.OneOf(ATTENTIONS),
            cross_attention=checks.OneOf(CROSS_ATTENTIONS),
            routing=checks.OneOf(ROUTINGS),
            noise=checks.Number(least=0),
            max_segments=checks.COUNT,
        )
        if self.noise and self.routing == "truncation":
            raise ValueError(
                f"Coda.noise={self.noise} has no effect with routing='truncation', which has no "
                "scores"
            )

    @property
    def needs_rng(self) -> bool:
        """Whether scores get noise."""
        return self.noise > 0

    def reductions(self, num_layers: int) -> tuple[float, ...]:
        """The reduction of each layer; one number stands for `num_layers` equal ones."""
        if isinstance(self.reduction, tuple):
            return self.reduction
        return (self.reduction,) * num_layers

    def budget(
        self, mask: Bool[Array, "b n"], segment_ids: Int[Array, "b n"] | None, reduction: float
    ) -> tuple[Int[Array, "b s"], int]:
        """(k of each segment [B, S], K); S = 1 where rows are not packed."""
        num_segments = 1 if segment_ids is None else self.max_segments
        segments = mask.astype(jnp.int32) if segment_ids is None else segment_ids
        lengths = jnp.sum(
            (segments[:, None, :] == jnp.arange(1, num_segments + 1)[:, None]) & mask[:, None, :],
            axis=-1,
        )
        return num_selected(lengths, reduction), capacity(mask.shape[1], reduction, num_segments)

    def validate(self, config: Any) -> None:
        """Raises ValueError where the model does not have that many layers, or no decoder."""
        given = len(self.reductions(config.num_encoder_layers))
        if given != config.num_encoder_layers:
            raise ValueError(
                f"Coda.reduction has {given} entries for {config.num_encoder_layers} encoder layers"
            )
        if self.cross_attention != "all" and not config.num_decoder_layers:
            raise ValueError(
                f"Coda.cross_attention={self.cross_attention!r} is for models with a decoder; this "
                f"{config.family!r} has none: it must be 'all'"
            )

    def continues(self, saved: Method) -> bool:
        """True: a trained router serves at any reduction, temperature and attentions."""
        return isinstance(saved, Coda)

    def route(self, tokens: Tokens, place: Place) -> Tokens:
        """The tokens with what the router selects of them."""
        reduction = self.reductions(place.num_layers)[place.index]
        return tokens.replace(selection=Router(self, reduction, name="router")(tokens))

    def wrap_layer(self, layer: Layer, place: Place) -> Layer:
        """An encoder layer on the selected tokens; a decoder layer as it is."""
        if place.stack != "encoder":
            return layer

        def conditional(tokens, context):
            selection = tokens.selection
            if selection is None:
                return layer(tokens, context)
            selected = selection.gather(tokens)
            context = selected if self.attention == "k_to_k" else context
            return selection.scatter_add(tokens, layer(selected, context) - selected.x)

        return conditional

    def tokens_read(self, length: int, config: Any) -> int:
        """How many of the N tokens of a row, or slots for some, a model's decoder attends to."""
        if self.cross_attention == "all":
            return length
        return capacity(length, self.reductions(config.num_encoder_layers)[-1])

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """Those of a layer on K = ceil(N / r) tokens, and the router's."""
        if place.stack != "encoder":
            return lambda tokens, context: flops(tokens, self.tokens_read(context, config))
        reduction = self.reductions(place.num_layers)[place.index]
        if reduction == 1:
            return flops
        per_token = 0 if self.routing == "truncation" else 2 * config.emb_dim

        def routed(tokens, context):
            selected = capacity(tokens, reduction)
            seen = context if self.attention == "k_to_all" else selected
            return flops(selected, seen) + per_token * tokens

        return routed


def with_reduction(
    methods: Sequence[Method], reduction: float | tuple[float, ...]
) -> tuple[Method, ...]:
    """The methods at another reduction, which needs no training.

    Raises:
        ValueError: none of them routes.
    """
    return _rerouted(methods, reduction=reduction)


def dense_routing(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The methods at r = 1."""
    return _replaced(methods, reduction=1.0)


def with_epsilon(methods: Sequence[Method], epsilon: float) -> tuple[Method, ...]:
    """The methods at another temperature of the soft top-k.

    Raises:
        ValueError: none of them has a soft top-k.
    """
    if (routing := routing_of(methods)) and routing.routing not in SOFT:
        raise ValueError(f"epsilon={epsilon} has no effect with routing={routing.routing!r}")
    return _rerouted(methods, epsilon=epsilon)


def _rerouted(methods, **values):
    if routing_of(methods) is None:
        (name, value) = next(iter(values.items()))
        raise ValueError(f"{name}={value} is given for a model that does not route")
    return _replaced(methods, **values)


def reduction_of(methods: Sequence[Method]) -> float | tuple[float, ...] | None:
    """The reduction of the routing; None for methods that do not route."""
    routing = routing_of(methods)
    return routing and routing.reduction


def epsilon_of(methods: Sequence[Method]) -> float | None:
    """The temperature of the soft top-k; None for methods that do not route."""
    routing = routing_of(methods)
    return routing and routing.epsilon


def with_room_of(methods: Sequence[Method], others: Sequence[Method]) -> tuple[Method, ...]:
    """The methods with the room of others for packed examples, which changes no result."""
    return _adjusted(methods, others, ("max_segments",))


def with_tuning_of(methods: Sequence[Method], others: Sequence[Method]) -> tuple[Method, ...]:
    """The methods at the reduction of others, where both route, and with their room."""
    return _adjusted(methods, others, ("max_segments", "reduction"))


def _adjusted(methods, others, names):
    given = routing_of(others)
    return _replaced(methods, **{name: getattr(given, name) for name in names if given})


def routing_of(methods: Sequence[Method]) -> Coda | None:
    """What routes; None where nothing does."""
    return next((method for method in methods if isinstance(method, Coda)), None)


def _replaced(methods, **values):
    return tuple(
        dataclasses.replace(method, **values) if isinstance(method, Coda) else method
        for method in methods
    )


def unrouted(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The other methods."""
    return tuple(method for method in methods if not isinstance(method, Coda))


def max_segments(methods: Sequence[Method]) -> int | None:
    """The most examples that a packed row may hold; None for no limit."""
    routing = routing_of(methods)
    return routing and routing.max_segments


def token_scores(u: Vectors, w: Float[Array, "d"]) -> Float[Array, "b n"]:
    """s = u . w in float32; on CPUs equal tokens have equal scores, whatever is around them.

    Args:
        u: [B, N, D] the normalised residual stream.
        w: [D] the router's vector.
    """
    return lax.platform_dependent(u, w, tpu=_scores_by_product, default=_scores_in_order)


def _scores_in_order(u, w):
    u = u.array() if isinstance(u, Normalized) else u
    return sum_in_order(u.astype(jnp.float32) * w.astype(jnp.float32))


@jax.custom_vjp
def _scores_by_product(u, w):
    """As three columns of one product, so that u need not be in memory."""
    w = w.astype(jnp.float32)
    rows, w = (u.x, u.scale * w) if isinstance(u, Normalized) else (u, w)
    columns = jnp.stack(one_hot.parts(w), axis=-1)
    scores = jnp.einsum(
        "bnd,dc->bnc",
        rows,
        columns,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).sum(-1)
    return scores * u.inverse_rms[..., 0] if isinstance(u, Normalized) else scores


def _scores_by_product_fwd(u, w):
    return _scores_by_product(u, w), (u, w)


def _scores_by_product_bwd(saved, cotangent):
    return jax.vjp(_scores_in_order, *saved)[1](cotangent)


_scores_by_product.defvjp(_scores_by_product_fwd, _scores_by_product_bwd)


class Router(nn.Module):
    """Scores the tokens, s = u . w, and picks k = ceil(length / reduction) of each example.

    Attributes:
        config: how tokens are scored and weighted.
        reduction: r of this layer, at least 1.
    """

    config: Coda
    reduction: float

    @nn.compact
    def __call__(self, tokens: Tokens) -> Selection | None:
        """Picks tokens; None stands for all of them with weight 1, which is what r = 1 gives."""
        scores = self._scores(tokens.u)
        if self.reduction == 1:
            return None
        if self.config.noise and self.has_rng("dropout"):  # which is given in training alone
            rng = self.make_rng("dropout")
            scores += self.config.noise * jax.random.normal(rng, scores.shape)
        mask, segment_ids = tokens.mask, tokens.segment_ids
        k, slots = self.config.budget(mask, segment_ids, self.reduction)
        indices, valid, weights = self._pick_and_weigh(scores, k, slots, mask, segment_ids)
        if segment_ids is not None:
            # More segments than the slots were counted for cannot be an error inside a compiled
            # program, and must not pass unseen: it makes the loss NaN.
            overflow = segment_ids.max() > self.config.max_segments
            weights = jnp.where(overflow, jnp.nan, weights)
        selection = Selection(indices, weights, valid)
        self.sow("intermediates", "selection", selection)
        return selection

    def _scores(self, u: Vectors) -> Float[Array, "b n"]:
        if self.config.routing == "truncation":
            return jnp.broadcast_to(-jnp.arange(u.shape[1], dtype=jnp.float32), u.shape[:2])
        kernel = partitioning.param_with_axes(
            "kernel",
            nn.initializers.normal(u.shape[-1] ** -0.5),
            (u.shape[-1],),
            jnp.float32,
            axes=("embed",),
        )
        return token_scores(u, kernel)

    def _pick_and_weigh(self, scores, k, num_slots, mask, segment_ids):
        """(indices, valid, weights), each [B, K]."""
        config = self.config
        if config.routing in SOFT:
            solver = config.epsilon, config.solver, config.num_iterations
            found = pick_and_weigh(scores, k, num_slots, mask, segment_ids, *solver)
            if config.routing == "soft_topk":
                return found
            indices, valid, weights = found
            return indices, valid, jnp.where(valid, weights + lax.stop_gradient(1 - weights), 0.0)
        indices, valid = select(scores, k, num_slots, mask, segment_ids)
        weights = jnp.ones_like(scores)
        if config.routing == "sigmoid":
            weights = nn.sigmoid(scores)
        return indices, valid, jnp.where(valid, take(weights, indices), 0.0)
