"""Whatever the optimizer, what the methods train is trained, and nothing else."""

import functools
import importlib
import types

from flax import traverse_util
from flax.core import freeze, unfreeze
from helpers import assert_same_tree, config, random_params, shapes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio

from coda_jax import methods, trees
from coda_jax.methods import Full, Lora
from coda_jax.training.partial_optimizer import steps_taken

# Not "t5x": this folder of tests would be found under that name.
pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)
adafactor, optimizers, partitioning, train_state = (
    importlib.import_module(f"t5x.{name}")
    for name in ("adafactor", "optimizers", "partitioning", "train_state")
)
t5x_models = importlib.import_module("coda_jax.t5x_models")

CONFIG = config(coda={"reduction": 2.0, "max_segments": 2})
LORA = config().replace(methods=(Lora(),))
RATE = 0.1
OPTIMIZERS = {
    "t5x_adafactor": lambda: adafactor.Adafactor(
        decay_rate=0.8, logical_factor_rules=adafactor.standard_logical_factor_rules()
    ),
    "t5x_adafactor_with_momentum": lambda: adafactor.Adafactor(beta1=0.9, min_dim_size_to_factor=4),
    "t5x_chain": lambda: optimizers.chain([optax.clip(1.0), optax.adamw(RATE)]),
    "t5x_adamw": lambda: optimizers.adamw(RATE),
    "optax_adamw": lambda: optax.adamw(RATE),
    "optax_adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=4),
    "optax_adafactor_with_momentum": lambda: optax.adafactor(RATE, momentum=0.9),
    "optax_novograd": lambda: optax.novograd(RATE),
    "optax_multi_transform": lambda: optax.multi_transform(
        {"scales": optax.sgd(RATE), "others": optax.adam(RATE)},
        lambda params: jax.tree.map(lambda x: "scales" if x.ndim == 1 else "others", params),
    ),
}


def made(name, cfg=CONFIG):
    """The optimizer that a T5X model of the config has."""
    vocabulary = seqio.PassThroughVocabulary(cfg.vocab_size, eos_id=1)
    return t5x_models.CodaEncoderDecoderModel(
        cfg.network(), vocabulary, vocabulary, OPTIMIZERS[name]()
    ).optimizer_def


@functools.cache
def start(name, cfg=CONFIG):
    """T5X's train state of random parameters, with the optimizer of a name."""
    definition = made(name, cfg)
    variables = {"params": random_params(cfg), "params_axes": shapes(cfg)["params_axes"]}
    return train_state.FlaxOptimTrainState.create(definition, freeze(variables))


@pytest.mark.parametrize(
    ("name", "cfg"),
    [*((name, CONFIG) for name in OPTIMIZERS), ("t5x_adafactor", LORA), ("t5x_chain", LORA)],
)
def test_frozen_leaves_keep_their_bits_and_have_no_state(name, cfg):
    state = start(name, cfg)
    trained, frozen = methods.partition(cfg, unfreeze(state.params))
    gradients = jax.tree.map(lambda x: jnp.ones_like(x) + x, state.params)
    step = jax.jit(lambda s: s.apply_gradient(gradients, learning_rate=RATE))
    after = step(step(state))
    assert int(after.step) == 2 and type(after.params) is type(state.params)
    new, kept = methods.partition(cfg, unfreeze(after.params))
    assert_same_tree(kept, frozen)
    for path, leaf in trees.flatten(new).items():
        assert (leaf != trees.flatten(trained)[path]).any(), path
    held = sum(leaf.size for leaf in jax.tree.leaves(state.param_states))
    assert held <= 2 * trees.count(trained) + 8 * len(jax.tree.leaves(trained))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_saved_restored_and_divided_as_its_parameters(name):
    first = start(name)
    gradients = jax.tree.map(jnp.ones_like, first.params)
    state = jax.jit(lambda s: s.apply_gradient(gradients, learning_rate=RATE))(first)
    again = first.restore_state(state.state_dict())
    assert_same_tree(*(jax.tree.map(jnp.asarray, x.state_dict()) for x in (again, state)))
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    axes = partitioner.get_mesh_axes(jax.eval_shape(lambda: first))
    assert jax.tree.structure(axes.params, is_leaf=_whole) == jax.tree.structure(state.params)
    specs = traverse_util.flatten_dict(unfreeze(axes.state_dict()["target"]), sep="/")
    flat = traverse_util.flatten_dict(state.state_dict()["state"]["param_states"], sep="/")
    found = traverse_util.flatten_dict(axes.state_dict()["state"]["param_states"], sep="/")
    assert found.keys() == flat.keys()
    divided = 0
    for path, leaf in flat.items():
        if found[path] is not None:
            (owner,) = [p for p in specs if f"/{p}/" in f"/{path}/"]
            assert found[path] == specs[owner] and leaf.shape == _leaf(state.params, owner).shape
            divided += 1
    assert divided >= 1 or "factor" in name


def _whole(leaf):
    return leaf is None


def _leaf(params, path):
    return trees.flatten(params)[path]


def test_optax_adafactor_and_t5xs_learn_what_they_would_learn_alone():
    """The state of what is trained is that of an optimizer that sees nothing else."""
    params, trained = random_params(CONFIG), methods.partition(CONFIG, random_params(CONFIG))[0]
    gradients = jax.tree.map(lambda x: x + 0.1, params)
    for name in ("t5x_adafactor_with_momentum", "optax_adafactor"):
        definition, alone = made(name), OPTIMIZERS[name]()
        if isinstance(alone, optax.GradientTransformation):
            alone = optimizers.OptaxWrapper(alone)
        found, _ = definition.apply_gradient(
            definition.update_hyper_params(learning_rate=RATE),
            params,
            definition.init_state(params),
            gradients,
        )
        expected, _ = alone.apply_gradient(
            alone.update_hyper_params(learning_rate=RATE),
            trained,
            alone.init_state(trained),
            methods.partition(CONFIG, gradients)[0],
        )
        assert_same_tree(methods.partition(CONFIG, found)[0], expected)


class Doubled(Full):
    """Full tuning with twice the update."""

    name = "full"

    def wrap_optimizer(self, optimizer):
        """The optimizer's updates, doubled."""
        return optax.chain(optimizer, optax.scale(2.0))


def test_each_methods_own_part_of_a_step_is_in_the_optimizer():
    params = {"kernel": jnp.ones(3)}
    found = []
    for method in (Full(), Doubled()):
        cfg = config().replace(methods=(method,))
        definition = t5x_models.for_what_is_trained(optax.sgd(0.1), cfg)
        state = definition.init_state(params)
        new, _ = definition.apply_gradient(definition.hyper_params, params, state, params)
        found.append(1 - new["kernel"])
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"\['full'\] have a part in each step.* Adafactor"):
        t5x_models.for_what_is_trained(adafactor.Adafactor(), cfg)


def test_what_cannot_serve_is_refused_with_the_remedy():
    everything = traverse_util.ModelParamTraversal(lambda path, _: True)
    several = optimizers.MultiOptimizer([(everything, adafactor.Adafactor(0.1))])
    with pytest.raises(ValueError, match=r"MultiOptimizer cannot go on.*optax.multi_transform can"):
        t5x_models.for_what_is_trained(several, CONFIG)
    with pytest.raises(ValueError, match=r"nothing is trained: METHODS=\(\)"):
        t5x_models.for_what_is_trained(optax.sgd(0.1), CONFIG.dense())


# --- The trainer: the true rate, and an end at what is not finite. ---


class FakeTrainer:
    """The part of T5X's trainer that the checks see: a step of a run whose losses are known."""

    def __init__(self, state, loss, params_after=None, learning_rate_fn=None):
        self.train_state, self._loss = state, loss
        self._learning_rate_fn = learning_rate_fn
        self._model = types.SimpleNamespace(module=CONFIG.network())
        self._after = params_after

    def _summary(self):
        return {"loss": types.SimpleNamespace(value=np.float32(self._loss))}

    def train(self, batch_iter, num_steps, start_step=None):
        """As T5X's, whose summary is there later."""
        self.train_state = self.train_state.replace_step(self.train_state.step + num_steps)
        if self._after is not None:
            self.train_state = self.train_state.replace_params(self._after)
        return types.SimpleNamespace(result=self._summary)

    def eval(self, batch_iters):
        """As T5X's."""
        return {name: self._summary() for name in batch_iters}


def trainer(name, loss=1.0, step=100, **kwargs):
    """A checked trainer of a run that starts at a step."""
    state = start(name).replace_step(jnp.int32(step))
    return t5x_models.checked_trainer(FakeTrainer)(state, loss, **kwargs)


def test_the_rate_that_is_logged_is_that_of_the_optimizers_own_count():
    def rate(step):
        return step / 10

    for name, expected in (("optax_adamw", 0.5), ("t5x_chain", 0.5), ("t5x_adafactor", 10.5)):
        found = trainer(name, learning_rate_fn=rate)
        assert float(found._learning_rate_fn(105)) == pytest.approx(expected), name
    # A run that goes on: three steps are in the optimizer's state.
    state = start("optax_adamw")
    step = jax.jit(lambda s: s.apply_gradient(state.params, learning_rate=0.1))
    for _ in range(3):
        state = step(state)
    assert int(steps_taken(state.param_states)) == 3
    state = state.replace_step(jnp.int32(103))
    found = t5x_models.checked_trainer(FakeTrainer)(state, 1.0, learning_rate_fn=rate)
    assert float(found._learning_rate_fn(103)) == pytest.approx(0.3)


def test_a_run_ends_where_a_loss_or_a_parameter_is_not_finite():
    assert trainer("optax_adamw").train(None, 5).result()["loss"].value == 1
    with pytest.raises(FloatingPointError, match=r"the loss of steps 101 to 105 is nan: nothing"):
        trainer("optax_adamw", loss=np.nan).train(None, 5)
    with pytest.raises(FloatingPointError, match=r"the loss of the evaluation on task is inf"):
        trainer("optax_adamw", loss=np.inf).eval({"task": None})
    params = trees.flatten(random_params(CONFIG))
    path = "encoder/layers_0/adapter/wi/kernel"
    params[path] = params[path].at[0, 0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match=rf"{path} has values .* after step 105: nothing"):
        trainer("optax_adamw", params_after=freeze(trees.unflatten(params))).train(None, 5)
