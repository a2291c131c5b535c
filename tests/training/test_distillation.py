"""A routed student follows the dense model that it is made of."""

import dataclasses
import re

from contract.programs import batch_of
from helpers import TINY, TINY_IMAGES, TINY_SPEECH, config, random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import rel_entr, softmax
from training_runs import CONFIG, OPTIONS, make_batches, run

from coda_jax import trees
from coda_jax.methods import Lora, ParallelAdapter, dense_routing
from coda_jax.objectives import BestRQ, Seq2Seq, model_for
from coda_jax.sharding import Placement
from coda_jax.training import steps
from coda_jax.training.distillation import Distillation, divergence

ROUTED = {"reduction": 2.0}
LABELLED = {"num_decoder_layers": 0, "head": "classification", "labels": ("a", "b", "c")}
BASES = {
    "text": TINY,
    "images": TINY_IMAGES,
    "speech": TINY_SPEECH,
    "labels": TINY.replace(**LABELLED),
}


def dense_of(student):
    """(config, params) of the student's model without routing, with other adapters and norms."""
    teacher = student.replace(methods=dense_routing(student.methods), dropout_rate=0.0)
    return teacher, with_other_trained(student, random_params(student))


def with_other_trained(cfg, params, seed=7):
    """The parameters with other values for what is trained."""
    model = model_for(cfg)
    other, _ = steps.partition(model, random_params(cfg, seed))
    return trees.merge(other, steps.partition(model, params)[1])


def distillation_of(student, weight=0.4, temperature=2.0):
    """A teacher for a student, the student's parameters, and the teacher's own leaves."""
    teacher, teacher_params = dense_of(student)
    found = Distillation(model_for(teacher), teacher_params, weight, temperature)
    params = random_params(student)
    _, frozen = steps.partition(model_for(student), params)
    return found, params, found.own_leaves(frozen, Placement())


def labelled(name, cfg):
    """A batch; of labels, each row has one."""
    batch = dict(batch_of(cfg))
    if name == "labels":
        batch["decoder_target_tokens"] = np.array([[2], [0]], np.int32)
        batch["decoder_loss_weights"] = np.ones((2, 1), np.int32)
    return batch


# --- The loss ---


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_scipy(temperature):
    teacher, student = np.random.default_rng(0).normal(0, 4, (2, 3, 5, 7)).astype(np.float32)
    expected = rel_entr(softmax(teacher / temperature, -1), softmax(student / temperature, -1))
    found = divergence(teacher, student, temperature)
    np.testing.assert_allclose(found, temperature**2 * expected.sum(-1), rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(divergence(teacher, teacher), 0)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.all] * (x == "speech")) for x in BASES]
)
def test_the_loss_is_that_of_the_task_and_of_the_teacher(name):
    student = config(ROUTED, base=BASES[name], dropout_rate=0.0)
    model, batch = model_for(student), labelled(name, student)
    distillation, params, own = distillation_of(student)
    found, sums = jax.jit(distillation.loss_of(model))(params, batch, None, own)

    task, task_sums = model.loss(params, batch)
    logits = model.logits(params, batch)
    followed = distillation.teacher.logits(distillation.params, batch)
    places = rel_entr(softmax(followed / 2, -1), softmax(logits / 2, -1)).sum(-1)
    if name == "speech":
        counted = batch["encoder_input_tokens"][..., 0] > 0
    else:
        counted = batch["decoder_loss_weights"].reshape(places.shape)
    expected = 0.6 * task + 0.4 * 4 * (places * counted).sum()
    assert abs(float(task - found)) > 1e-2 * abs(float(task))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert sums.replace(loss=task) == task_sums.replace(loss=task) and sums.loss == found


def test_alone_the_teacher_needs_no_targets_of_a_ctc_head():
    student = config(ROUTED, base=TINY_SPEECH, dropout_rate=0.0)
    batch, model = dict(batch_of(student)), model_for(student)
    distillation, params, own = distillation_of(student, weight=1.0)
    _, sums = distillation.loss_of(model)(params, batch, None, own)
    unlabelled = batch | {name: batch[name] * 0 for name in batch if name.startswith("decoder")}
    _, without = distillation.loss_of(model)(params, unlabelled, None, own)
    assert sums.loss == without.loss > 0
    assert without.weight == (batch["encoder_input_tokens"][..., 0] > 0).sum()
    assert without.correct == without.exact == 0 and without.examples == 2
    assert not distillation.reads_targets(model)
    assert distillation.reads_targets(Seq2Seq(CONFIG))
    assert dataclasses.replace(distillation, weight=0.5).reads_targets(model)


def test_the_dense_student_is_its_own_teacher_at_the_start():
    student = config({"reduction": 1.0}, dropout_rate=0.0)
    params, model = random_params(student, fresh=True), model_for(student)
    dense = trees.split(params, (r"(^|/)(router|adapter)/",))[1]
    distillation = Distillation(model_for(student.dense()), dense, 1.0)
    own = distillation.own_leaves(steps.partition(model, params)[1], Placement())
    _, sums = distillation.loss_of(model)(params, batch_of(student), None, own)
    assert 0 <= sums.loss / sums.weight < 1e-6


def test_the_teacher_has_no_gradient_and_shares_what_is_frozen():
    student = config(ROUTED, dropout_rate=0.0)
    model = model_for(student)
    distillation, params, own = distillation_of(student)

    def loss(own):
        return distillation.loss_of(model)(params, batch_of(student), None, own)[0]

    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(loss)(own)))
    trained, _ = steps.partition(model, random_params(student))
    assert trees.flatten(own).keys() == trees.flatten(trained).keys()


# --- Refusals ---


def test_a_teacher_of_another_base_is_refused():
    distillation, _, _ = distillation_of(config(ROUTED))
    _, frozen = steps.partition(model_for(config(ROUTED)), random_params(config(ROUTED), seed=1))
    flat = trees.flatten(jax.device_get(frozen))
    with pytest.raises(ValueError, match=r"another base than the student: \d+ of \d+ frozen leav"):
        distillation.own_leaves(trees.unflatten(flat), Placement())


def test_what_the_teachers_adapter_changed_is_its_own_where_the_student_is_frozen():
    """The norms of a student with LoRA, for example."""
    student = TINY.replace(methods=(Lora(rank=2),), dropout_rate=0.0)
    teacher = TINY.replace(methods=(ParallelAdapter(4),))
    base = random_params(TINY)
    params = trees.merge(trees.split(random_params(student), (r"/lora_",))[0], base)
    theirs = with_other_trained(teacher, trees.merge(base, only_adapters(teacher)))
    found = Distillation(model_for(teacher), theirs, 0.5)
    own = trees.flatten(
        found.own_leaves(steps.partition(model_for(student), params)[1], Placement())
    )
    assert {path.split("/")[-2] for path in own} >= {"decoder_norm", "wi"}
    assert own.keys() == {
        path for path in trees.flatten(theirs) if "norm" in path or "adapter" in path
    }


def only_adapters(cfg):
    """Random adapters."""
    return trees.split(random_params(cfg), (r"/adapter/",))[0]


def test_objectives_without_distributions_have_no_teacher():
    speech = config(ROUTED, base=TINY_SPEECH)
    number = TINY.replace(num_decoder_layers=0, head="regression", methods=CONFIG.methods)
    for model in (BestRQ(speech), model_for(number)):
        with pytest.raises(ValueError, match=f"'{model.name}' has no distributions that a teacher"):
            Distillation(model, {}, 0.5)


@pytest.mark.parametrize("bad", [{"weight": 0}, {"weight": 1.5}, {"temperature": 0}])
def test_values_out_of_range_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"Distillation\.{name} must be"):
        Distillation(Seq2Seq(CONFIG), {}, **{"weight": 0.5} | bad)


# --- Runs ---


def test_a_run_learns_from_its_teacher_and_goes_on_with_the_same_bits(tmp_path, capsys):
    teacher, teacher_params = dense_of(CONFIG)
    given = {"distillation": Distillation(Seq2Seq(teacher), teacher_params, 1.0)}
    given |= {"options": dataclasses.replace(OPTIONS, total_steps=4, save_every=2)}
    before, expected, _ = run(tmp_path / "uncut", **given)
    assert "teacher: its pass over a batch takes" in capsys.readouterr().out
    frozen = steps.partition(Seq2Seq(CONFIG), expected)[1]
    for path, leaf in trees.flatten(frozen).items():
        np.testing.assert_array_equal(leaf, trees.flatten(before)[path], path)
    with pytest.raises(ValueError, match="the data ended after 2 of 4"):
        run(tmp_path / "cut", batches=make_batches(2), **given)
    _, found, _ = run(tmp_path / "cut", **given)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    changes = {"weight": 0.5, "params": with_other_trained(CONFIG, teacher_params, seed=8)}
    other = dataclasses.replace(given["distillation"], **changes)
    with pytest.raises(ValueError) as error:
        run(tmp_path / "cut", **given | {"distillation": other})
    assert re.search(r"distillation/weight: there 1(\.0)?, here 0\.5", str(error.value))
    assert re.search(r"the teacher's leaves: \d+ of \d+ differ", str(error.value))
    assert len(str(error.value).splitlines()) == 4


def test_a_student_comes_nearer_to_its_teacher():
    student = config(ROUTED, ParallelAdapter(bottleneck=8), dropout_rate=0.0)
    model, batch = model_for(student), batch_of(student)
    distillation, _, _ = distillation_of(student, weight=1.0, temperature=1.0)
    params = random_params(student, fresh=True)
    optimizer = steps.make_optimizer(model, optax.adam, 1e-2)
    state, frozen, shardings = steps.start(model, params, optimizer, Placement())
    own = distillation.own_leaves(steps.partition(model, params)[1], Placement())
    step = steps.make_train_step(model, optimizer, 1, 0, shardings, distillation)
    losses = []
    for _ in range(40):
        state, sums = step(state, frozen, batch, own)
        losses.append(float(sums.loss))
    assert losses[-1] < 0.3 * losses[0]
    assert jnp.isfinite(jnp.array(losses)).all()
