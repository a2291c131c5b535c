"""What `coda bench` compares: a model's configurations, and the programs of each.

Axis letters: B batch, N input tokens, T target tokens.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax import checkpoints, methods, trees
from coda_jax.methods import comparisons
from coda_jax.models import ModelConfig, family_of, param_shapes
from coda_jax.objectives import model_for
from coda_jax.profiling import flops
from coda_jax.training import steps

BASELINE = comparisons.BASELINE
LEGEND = (
    "The bound is how many times fewer operations there are, of a training step by XLA's count; "
    "what is reached of it is the speed-up divided by it."
)


def compared(
    dense: ModelConfig,
    reductions: Sequence[float],
    attentions: Sequence[str] = methods.ATTENTIONS,
) -> dict[str, ModelConfig]:
    """The configurations that are compared, by name, the baseline first."""
    routed = comparisons.conditional(reductions, attentions=attentions)
    every = {BASELINE: comparisons.baseline(), **routed}
    return {name: dense.replace(methods=adaptation) for name, adaptation in every.items()}


class Programs:
    """The programs of one method, each as (function, arguments) on random tokens.

    Attributes:
        config: the method's configuration.
        params: the dense model's parameters, and the method's own; arrays or their shapes.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping,
        batch: Mapping[str, np.ndarray],
        network: nn.Module | None = None,
    ):
        """Args:
            config: the method's configuration.
            params: as the attribute.
            batch: as of `random_batch`.
            network: another library's in the place of the config's; it has no `end_to_end`.
        """  # fmt: skip
        self.config, self.params = config, params
        self._model = model_for(config)
        self._model.module = network or self._model.module
        self._batch = dict(batch)

    def encoder(self) -> tuple[Callable, tuple]:
        """Encodes the batch."""
        return self._model.encode, (self.params, self._batch["encoder_input_tokens"])

    def end_to_end(self, num_beams: int = 1) -> tuple[Callable, tuple]:
        """Encodes the batch and answers; a decoder up to the last place, whatever comes out."""
        length = self._batch["decoder_target_tokens"].shape[1]
        endless = model_for(self.config.replace(eos_id=-1))
        answer = functools.partial(endless.predict, max_decode_length=length, num_beams=num_beams)
        return answer, (self.params, self._batch["encoder_input_tokens"])

    def beams(self) -> tuple[Callable, tuple]:
        """`end_to_end` with 4 beams."""
        return self.end_to_end(num_beams=4)

    def train_step(self, accumulation: int = 1) -> tuple[Callable, tuple]:
        """One step of Adam on the adapters, routers and norms; the next state comes first."""
        optimizer = optax.adam(1e-4)
        step = steps.make_train_step(self._model, optimizer, accumulation, seed=0)

        def start(params):
            trained, frozen = methods.partition(self.config, params)
            trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)
            count = jnp.zeros((), jnp.int32)
            return steps.TrainState(count, trained, optimizer.init(trained)), frozen

        abstract = isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)
        state, frozen = jax.eval_shape(start, self.params) if abstract else start(self.params)
        return step, (state, frozen, self._batch)


def compiled_call(
    measure_name: str,
    function: Callable,
    arguments: tuple,
    compiler_options: Mapping[str, str] | None = None,
) -> tuple[jax.stages.Compiled, Callable]:
    """The compiled program, and a call of it that goes on from the state that it left."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*arguments).compile(compiler_options)
    if measure_name != "train_step":
        return compiled, lambda: compiled(*arguments)
    state, *others = arguments

    def step():
        nonlocal state
        state, sums = compiled(state, *others)
        return sums

    return compiled, step


def random_params(config: ModelConfig, dtype: np.dtype) -> Mapping:
    """Parameters of about the right size; `init`, in one program, would take minutes to compile."""

    def draw(key, shape):
        if len(shape) < 2:
            return jnp.ones(shape, dtype)
        return math.prod(shape[:-1]) ** -0.5 * jax.random.normal(key, shape, dtype)

    leaves, tree = jax.tree.flatten(param_shapes(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return jax.tree.unflatten(tree, [draw(key, leaf.shape) for key, leaf in pairs])


def adapted(config: ModelConfig, params: Mapping) -> Mapping:
    """A base's parameters with the fresh leaves of the config's methods."""
    # Drawn on the CPU, for which that compiles many times as fast as for a GPU.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = checkpoints.swap_in(config, params, jax.random.key(0))
    return jax.device_put(found, jax.devices()[0])


def random_batch(config: ModelConfig, batch: int, length: int, target_length: int) -> dict:
    """Random inputs in full rows, as a batch of the trainer."""
    rng = np.random.default_rng(0)
    inputs = family_of(config).inputs.random(config, rng, batch, length)
    targets = rng.integers(2, config.vocab_size, (batch, target_length)).astype(np.int32)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(
            targets, ((0, 0), (1, 0)), constant_values=config.decoder_start_id
        )[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones_like(targets),
    }


def served_shapes(config: ModelConfig) -> Mapping:
    """Shapes of the parameters: the base's in the dtype of the computation, as it is served."""
    created = methods.created(config)

    def held(path, leaf):
        dtype = leaf.dtype if trees.matches(path, created) else np.dtype(config.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    flat = trees.flatten(param_shapes(config))
    return trees.unflatten({path: held(path, leaf) for path, leaf in flat.items()})


def with_head(config: ModelConfig) -> ModelConfig:
    """The config; one without a head gets that of its family's published sizes."""
    if not config.lacks_head:
        return config
    given = next(iter(family_of(config).presets.values()))
    return config.replace(**{name: getattr(given, name) for name in config.head_fields})


def operations(batch_size: int, input_length: int, target_length: int) -> dict[str, Callable]:
    """{measure: a config's operations}, of the measures for which they are counted by hand."""
    sizes = batch_size, input_length
    return {
        "encoder": lambda config: flops.encoder_flops(config, *sizes),
        "end_to_end": lambda config: flops.answer_flops(config, *sizes, target_length),
    }
