"""What a method of adaptation is: the base class of all methods.

A method changes a network in three places, all of them optional: it wraps whole layers
(`wrap_layer`), it wraps modules inside them (`wrap_module`), and it wraps the optimizer
(`wrap_optimizer`). Which leaves it creates and which of the base's it trains are path patterns;
what a run trains and what an adapter file holds follow from them alone.

Axis letters: B batch, N tokens, K selected tokens, D embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
from flax.linen import partitioning
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from coda_jax import trees
from coda_jax.nn.quantized import quantization_of
from coda_jax.nn.tokens import Tokens

# (tokens to work on [B, K, D], tokens to attend to [B, K or N, D]) -> [B, K, D], residual
# connections included.
Layer = Callable[[Tokens, Tokens], Float[Array, "b k d"]]
# (tokens of a row to work on, tokens to attend to) -> floating-point operations.
LayerFlops = Callable[[int, int], float]
Call = Callable[..., Any]  # of a Flax module
# Of the layer norms, which most methods train with their own leaves.
NORMS = (r"(^|/)\w*norm/(scale|bias)$",)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        stack: "encoder" or "decoder".
        index: of the layer in its stack, from 0.
        num_layers: of the stack.
    """

    stack: str
    index: int
    num_layers: int

    @property
    def path(self) -> str:
        """Of the layer's leaves."""
        return f"{self.stack}/layers_{self.index}"


class Method:
    """A way to adapt a frozen model; each is a frozen dataclass with its options as fields.

    Attributes:
        name: in gin files, manifests and `METHODS`.
        creates: patterns of the paths of its new leaves, which no dense checkpoint has.
        also_trains: patterns of the base's leaves that it trains; an adapter file holds them too.
        without_gradient: patterns of those of its new leaves that its own step alone changes, like
            masks: what they get for a gradient may be anything.
        starts_as_base: whether fresh leaves leave the base's outputs as they are.
        packs: whether examples that share a row still give what they give alone.
        on_quantized: whether it is of use beside frozen weights that are quantised.
        profile_scopes: {part of a profile: names of the modules and scopes that belong to it}.
    """

    name: ClassVar[str]
    creates: ClassVar[tuple[str, ...]] = ()
    also_trains: ClassVar[tuple[str, ...]] = ()
    without_gradient: ClassVar[tuple[str, ...]] = ()
    starts_as_base: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    on_quantized: ClassVar[bool] = True
    profile_scopes: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def needs_rng(self) -> bool:
        """Whether it draws random numbers in training; by default not."""
        return False

    @property
    def least_steps(self) -> int:
        """Steps of training after which the model is what was asked for; by default none.

        A shorter training is refused, and no evaluation before them is the best.
        """
        return 0

    @classmethod
    def examples(cls) -> tuple["Method", ...]:
        """Instances for tests, the usual one first; together they cover every variant.

        By default the one without arguments.
        """
        return (cls(),)

    def validate(self, config: Any) -> None:
        """Raises ValueError where the method does not fit the model of a config."""

    def continues(self, saved: "Method") -> bool:
        """Whether leaves saved with other options of the method serve these; by default not.

        They do where an option changes how leaves are used, but not what they mean.
        """
        return self == saved

    def route(self, tokens: Tokens, place: Place) -> Tokens:
        """The tokens of an encoder layer with its `selection`; by default as they are.

        Called before the layer, in the scope of `wrap_layer`, which makes use of it: what it
        returns is of `Selection.scatter_add`, which also adds what stands beside the layer.
        """
        del place
        return tokens

    def wrap_layer(self, layer: Layer, place: Place) -> Layer:
        """The layer with the method around it; by default as it is.

        Called within the compact method of a Flax module, whose scope gets the method's parameters
        beside those of the layer.
        """
        del place
        return layer

    def wrap_module(self, call: Call, module: nn.Module) -> Call:
        """A module's `__call__` with the method around it; by default as it is.

        Asked at every call of every module of the network, methods' own left out. What is returned
        runs in the module's scope: parameters that it makes lie beside the module's. A
        `Dense` may be called with `nn.layers.Normalized`: `nn.layers.product` takes it, and
        `.array()` multiplies it out. The keys and values of a decoder's
        `encoder_decoder_attention` must stay linear in the encoding, and the same for all rows:
        TPUs decode with their matrices, see `nn.attention.Attention.matrices`.
        """
        del module
        return call

    def wrap_optimizer(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The method's own part of a training step, inside the compiled step of both trainers.

        By default the optimizer as it is. What a method keeps from step to step (a schedule, a
        score for each channel) is the state of the transformation that it returns, and is in the
        checkpoints of both trainers; what its layers read (a mask) is a leaf that it `creates`,
        and it changes such a leaf by that leaf's update.
        """
        return optimizer

    def progress(self, params: Mapping[str, Any]) -> dict[str, float]:
        """What the log says of the trained leaves beside the loss; by default nothing."""
        del params
        return {}

    def wrap_flops(self, flops: LayerFlops, place: Place, config: Any) -> LayerFlops:
        """The operations of `wrap_layer` and `wrap_module` on a layer; by default no more."""
        del place, config
        return flops

    def call_flops(self, place: Place, config: Any) -> float:
        """Operations on a layer's leaves alone, once a call for all rows; by default none."""
        del place, config
        return 0.0

    def merge(self, config: Any, params: Mapping[str, Any]) -> tuple["Method | None", Mapping]:
        """Folds the method into the base: (what is left of it, the parameters).

        By default nothing can be folded, and all of it is left.
        """
        del config
        return self, params

    @classmethod
    def combined(
        cls,
        methods: Sequence["Method"],
        leaves: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
    ) -> tuple["Method", dict[str, Any]]:
        """One method in the place of several of its kind; by default the weighted sum of leaves.

        Args:
            methods: one for each adapter.
            leaves: {path: leaf} that it created in each.
            weights: one for each adapter.

        Returns:
            (the method, its leaves); of options that may differ, see `continues`, the first's.

        Raises:
            ValueError: fields or leaves differ, or are such as cannot be added.
        """
        if cls.without_gradient:
            raise ValueError(f"adapters of {cls.name!r} cannot be added: masks have no sums")
        for other in methods[1:]:
            if not methods[0].continues(other):
                raise ValueError(f"adapters with other fields cannot be added: {[*methods]}")
        return methods[0], trees.weighted_sum(leaves, weights)

    def finish(self, config: Any, params: Mapping[str, Any]) -> tuple["Method | None", Mapping]:
        """What is exported after training: (the method, the parameters); by default as it is."""
        del config
        return self, params


@contextlib.contextmanager
def applied_to_modules(methods: tuple[Method, ...]) -> Iterator[None]:
    """While open, the calls of modules go through `wrap_module` of the methods, in their order."""
    wrapping = [m for m in methods if type(m).wrap_module is not Method.wrap_module]
    own = tuple(pattern for method in methods for pattern in method.creates)
    if not wrapping:
        yield
        return

    def intercept(call, arguments, keywords, context):
        path = "/".join(context.module.path) + "/"
        if context.method_name == "__call__" and not trees.matches(path, own):
            for method in wrapping:
                call = method.wrap_module(call, context.module)
        return call(*arguments, **keywords)

    with nn.intercept_methods(intercept):
        yield


def new_leaf(
    name: str, start: nn.initializers.Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """A float32 leaf that a method creates in the module that it is around.

    Args:
        name: of the leaf.
        start: its initializer.
        shape: its sizes.
        axes: the logical name of each axis.
    """
    return partitioning.param_with_axes(name, start, shape, jnp.float32, axes=axes)


def conditional_layer(methods: tuple[Method, ...], layer: Layer, place: Place) -> Layer:
    """The layer with every method around it, in their order."""
    for method in methods:
        layer = method.wrap_layer(layer, place)
    return layer


def routed(methods: tuple[Method, ...], tokens: Tokens, place: Place) -> Tokens:
    """The tokens of an encoder layer with what the methods select of them."""
    for method in methods:
        tokens = method.route(tokens, place)
    return tokens


def acting(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """Those that change what a model answers; the others only say what is trained."""
    hooks = ("wrap_layer", "wrap_module")
    return tuple(
        method
        for method in methods
        if method.creates or any(getattr(type(method), x) is not getattr(Method, x) for x in hooks)
    )


def least_steps(methods: Iterable[Method]) -> int:
    """Steps of training after which all methods are done with the model."""
    return max((method.least_steps for method in methods), default=0)


def check_steps(methods: Iterable[Method], steps: int) -> None:
    """Raises ValueError where a training has too few steps for a method."""
    for method in methods:
        if steps < method.least_steps:
            raise ValueError(
                f"{method.name!r} changes the model until step {method.least_steps:,}, and the "
                f"training ends after step {steps:,}: give it more steps, or the method fewer"
            )


def check_packs(methods: Iterable[Method]) -> None:
    """Raises ValueError where a method cannot keep packed examples apart."""
    mixing = [method.name for method in methods if not method.packs]
    if mixing:
        raise ValueError(f"{mixing} cannot keep packed examples apart: pack=False")


def created(config: Any) -> tuple[str, ...]:
    """Patterns of the leaves that no base has: those of the config's methods."""
    return tuple(pattern for method in config.methods for pattern in method.creates)


def trained(config: Any) -> tuple[str, ...]:
    """Patterns of the leaves that are trained: those of the methods, and the head.

    The same leaves are in the adapter file. A head, such as that of CTC, is new for most tasks.
    """
    also = (pattern for method in config.methods for pattern in method.also_trains)
    return (*created(config), *also, *config.heads) if config.methods else ()


def partition(config: Any, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """Splits a parameter tree into what is trained and what is frozen."""
    return trees.split(params, trained(config))


def check_start(config: Any, params: Mapping[str, Any], checkpoint: Any) -> None:
    """Checks that what a run does not train comes from somewhere.

    Args:
        config: the run's.
        params: its parameters, or their shapes.
        checkpoint: where they come from; None, or nothing, for nowhere.

    Raises:
        ValueError: it is nowhere, and some are frozen.
    """
    frozen = trees.count(partition(config, params)[1])
    if frozen and not checkpoint:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH={checkpoint!r}: {frozen:,} of {trees.count(params):,} "
            "parameters are frozen and would stay random; name a checkpoint, or train all of them "
            "(methods/full.gin)"
        )


def _fold(config: Any, params: Mapping[str, Any], step: str) -> tuple[Any, Mapping[str, Any]]:
    """Applies `merge` or `finish` of each method, the outermost last."""
    kept = []
    for method in config.methods:
        method, params = getattr(method, step)(config, params)
        if method is not None:
            kept.append(method)
    return config.replace(methods=tuple(kept)), params


def merge(config: Any, params: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Folds into the base what can be folded; the rest stays a method.

    Args:
        config: of the adapted model.
        params: its whole parameter tree.

    Returns:
        (config, params) of a model that gives the same outputs.

    Raises:
        ValueError: a method could be folded, but into weights that are quantised.
    """
    folding = [m.name for m in config.methods if type(m).merge is not Method.merge]
    if folding and (kind := quantization_of(params)):
        raise ValueError(
            f"{folding} cannot be merged into {kind} weights, whose few steps would round off what "
            "was learned: keep it beside them, as LAYOUT='adapter' does"
        )
    return _fold(config, params, "merge")


def finish(config: Any, params: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """(config, params) as they are exported after training, see `Method.finish`."""
    return _fold(config, params, "finish")
