"""`load_model`: a checkpoint, methods and an adapter file put together, or refused."""

import functools
import re

from helpers import (
    ADAPTER,
    TINY,
    TINY_IMAGES,
    TINY_SPEECH,
    assert_same_tree,
    config,
)
from helpers import (
    random_params as draw_params,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import bundled, checkpoints, methods, trees
from coda_jax.commands.loading import configured_preset, head, load_model
from coda_jax.data.vocabularies import find_fingerprint
from coda_jax.methods import Coda, Full, ParallelAdapter
from coda_jax.models import init_params

ROUTED = config({"reduction": 2.0})
UNUSED = {"mlp_activations": ("relu",), "relpos_num_buckets": 32, "relpos_max_distance": 128}
SPEECH = TINY_SPEECH.replace(conv_width=5, **UNUSED)  # a decoder's, which no folder says
HEADLESS = SPEECH.replace(vocab_size=0)
HEAD = ("ctc_head/kernel", "ctc_head/bias")


random_params = functools.cache(draw_params)


def split(cfg, params):
    """(what the methods of a config create, the dense parameters)."""
    return trees.split(params, methods.created(cfg))


def save(folder, cfg, *, adapter=None, vocabulary=None):
    """Saves the dense part of random parameters, and an adapter file; returns the parameters."""
    params = random_params(cfg)
    checkpoints.save_hf(folder, cfg.dense(), split(cfg, params)[1])
    if adapter is not None:
        checkpoints.save_adapter(adapter, cfg, params, vocabulary=vocabulary)
    return params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a dense checkpoint, an adapter file of CoDA for it, the parameters of both)."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    params = save(base, ROUTED, adapter=adapter)
    return str(base), str(adapter), params


def test_a_checkpoint_alone_is_dense(saved):
    base, _, params = saved
    found = load_model(base)
    assert found.config.methods == () and str(found.directory) == base
    assert_same_tree(found.params, split(ROUTED, params)[1])


def test_values_that_make_no_config_are_refused():
    with pytest.raises(ValueError, match=r"PRESET_CHANGES=.* has no effect without a PRESET"):
        configured_preset(None, {"vocab_size": 3})
    with pytest.raises(ValueError, match="CONFIG must be a ModelConfig, got 5"):
        load_model(config=5)


@pytest.mark.all
def test_a_model_can_start_at_random(saved):
    found = load_model(config=TINY, seed=3)
    assert found.directory is None
    fresh = jax.jit(functools.partial(init_params, TINY))(jax.random.key(3))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found.params, fresh)
    other = trees.flatten(load_model(config=TINY, seed=4).params)["decoder/logits_dense/kernel"]
    assert (trees.flatten(found.params)["decoder/logits_dense/kernel"] != other).any()


@pytest.mark.parametrize(
    "adapted", [ROUTED.methods, (ADAPTER,), (Full(),)], ids=["coda", "adapter", "full"]
)
def test_methods_add_their_leaves_and_leave_the_base_as_it_is(adapted, saved):
    base, _, params = saved
    found = load_model(base, methods=adapted)
    assert found.config == TINY.replace(methods=adapted, dropout_rate=0.0)
    new, dense = split(found.config, found.params)
    assert_same_tree(dense, split(ROUTED, params)[1])
    assert {path.split("/")[-2] for path in trees.flatten(new)} <= {"wi", "wo", "router"}
    assert bool(new) == (adapted != (Full(),))


def test_how_to_compute_is_said_apart_from_the_sizes(saved):
    base, adapter, _ = saved
    computed = TINY.replace(dropout_rate=0.5, dtype=jnp.bfloat16)
    found = load_model(base, config=computed)
    assert (found.config.dtype, found.config.dropout_rate) == (np.float32, 0.0)
    for given in ({}, {"adapter_checkpoint": adapter}):
        found = load_model(base, config=TINY, dtype="bfloat16", dropout_rate=0.2, **given)
        assert (found.config.dtype, found.config.dropout_rate) == (jnp.bfloat16, 0.2)


def test_an_adapter_file_brings_its_methods_and_leaves(saved):
    base, adapter, params = saved
    for given in ({}, {"methods": ()}, {"config": TINY}):
        found = load_model(base, adapter_checkpoint=adapter, **given)
        assert found.config.methods == ROUTED.methods
        assert_same_tree(found.params, params)


@pytest.mark.parametrize(
    "given",
    [
        (Coda(5.0, attention="k_to_all", routing="sigmoid"), ADAPTER),
        (Coda((2.0, 3.0), max_segments=4), ADAPTER),
        (*ROUTED.methods, Full()),  # trains more, and creates nothing
    ],
)
def test_methods_given_with_an_adapter_file_may_use_its_leaves_otherwise(given, saved):
    base, adapter, params = saved
    found = load_model(base, adapter_checkpoint=adapter, methods=given)
    assert found.config.methods == given
    assert_same_tree(found.params, params)
    _, frozen = methods.partition(found.config, found.params)
    assert bool(frozen) == (Full() not in given)


def test_a_method_without_leaves_may_join_those_of_an_adapter_file(tmp_path):
    params = save(tmp_path, config(adapter=ADAPTER), adapter=tmp_path / "adapter")
    given = (Coda(routing="truncation"), ADAPTER)
    found = load_model(str(tmp_path), adapter_checkpoint=str(tmp_path / "adapter"), methods=given)
    assert found.config.methods == given
    assert_same_tree(found.params, params)
    with pytest.raises(ValueError, match="encoder/layers_0/router/kernel"):
        load_model(
            str(tmp_path), adapter_checkpoint=str(tmp_path / "adapter"), methods=ROUTED.methods
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((Coda(), ParallelAdapter(8)), f"holds {ADAPTER}, not {ParallelAdapter(8)}"),
        ((ParallelAdapter(4, "gelu"),), f"holds {ADAPTER}, not {ParallelAdapter(4, 'gelu')}"),
        ((ADAPTER,), "encoder/layers_1/router/kernel"),
        ((Coda(),), "encoder/layers_1/adapter/wi/kernel"),
        ((Full(),), "encoder/layers_1/adapter/wi/kernel"),
    ],
)
def test_methods_that_contradict_an_adapter_file_are_named(given, message, saved):
    base, adapter, _ = saved
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_model(base, adapter_checkpoint=adapter, methods=given)
    assert adapter in str(error.value)


def test_a_checkpoint_or_a_config_is_needed(saved):
    for given in ({}, {"adapter_checkpoint": saved[1]}):
        with pytest.raises(ValueError, match="needs a checkpoint or, to start at random, a config"):
            load_model(**given)


def test_a_config_of_other_sizes_is_refused(saved):
    with pytest.raises(ValueError, match=r"emb_dim=32, not 16; mlp_dim=8, not 24$"):
        load_model(saved[0], config=TINY.replace(emb_dim=32, mlp_dim=8))


@pytest.mark.parametrize("other", [TINY_IMAGES, TINY_SPEECH], ids=lambda cfg: cfg.family)
def test_a_config_of_another_family_is_refused(other, saved):
    with pytest.raises(ValueError, match=f"is a 't5', not a '{other.family}'"):
        load_model(saved[0], config=other)
    with pytest.raises(ValueError, match=f"belongs to a 't5', not to a '{other.family}'"):
        load_model(config=other, adapter_checkpoint=saved[1])


def test_an_adapter_file_fits_the_random_model_of_its_seed(tmp_path):
    made = load_model(config=TINY, methods=ROUTED.methods, seed=5)
    assert made.config.methods == ROUTED.methods
    assert "router" in made.params["encoder"]["layers_0"]
    checkpoints.save_adapter(tmp_path, made.config, made.params)
    found = load_model(config=TINY, adapter_checkpoint=str(tmp_path), seed=5)
    assert found.config == made.config and found.directory is None
    assert_same_tree(found.params, made.params)
    with pytest.raises(ValueError, match="belongs to another base"):
        load_model(config=TINY, adapter_checkpoint=str(tmp_path), seed=6)


def test_the_reduction_is_replaced_where_there_is_routing(saved):
    base, adapter, _ = saved
    for reduction in (5, (1, 7.5)):
        expected = (Coda(reduction), ADAPTER)
        for given in ({"methods": ROUTED.methods}, {"adapter_checkpoint": adapter}):
            assert load_model(base, reduction=reduction, **given).config.methods == expected
    with pytest.raises(ValueError, match="reduction=3 is given for a model that does not route"):
        load_model(base, methods=(ADAPTER,), reduction=3)


def head_of(found):
    """The shape of the head, if there is one."""
    flat = trees.flatten(found.params)
    return flat[HEAD[0]].shape if HEAD[0] in flat else None


@pytest.mark.parametrize("adapted", [(), ROUTED.methods], ids=["dense", "adapted"])
def test_a_head_is_created_where_the_base_has_none(adapted, tmp_path):
    params = save(tmp_path, HEADLESS)
    assert head_of(load_model(str(tmp_path), methods=adapted)) is None
    given = HEADLESS.replace(vocab_size=30, blank_id=7)
    found = load_model(str(tmp_path), config=given, methods=adapted)
    assert head_of(found) == (16, 30)
    assert (found.config.vocab_size, found.config.blank_id) == (30, 7)
    _, dense = split(found.config, found.params)
    assert_same_tree({"encoder": dense["encoder"]}, params)
    with pytest.raises(ValueError, match=r"emb_dim=32, not 16$"):
        load_model(str(tmp_path), config=given.replace(emb_dim=32))


def test_a_head_that_is_there_stays(tmp_path):
    save(tmp_path, SPEECH)
    assert head_of(load_model(str(tmp_path), config=SPEECH)) == (16, 20)
    with pytest.raises(ValueError, match=r"vocab_size=30, not 20; blank_id=7, not 0$"):
        load_model(str(tmp_path), config=SPEECH.replace(vocab_size=30, blank_id=7))


def test_a_head_is_created_where_neither_base_nor_adapter_file_has_one(tmp_path):
    adapter = str(tmp_path / "adapter")
    params = save(tmp_path, HEADLESS.replace(methods=ROUTED.methods), adapter=adapter)
    found = load_model(str(tmp_path), adapter_checkpoint=adapter)
    assert (head_of(found), found.config.vocab_size) == (None, 0)
    found = load_model(str(tmp_path), adapter_checkpoint=adapter, config=SPEECH)
    assert (head_of(found), found.config.vocab_size) == ((16, 20), 20)
    assert_same_tree({"encoder": found.params["encoder"]}, params)


def test_an_adapter_file_brings_the_head_that_the_base_lacks(tmp_path):
    adapter, cfg = str(tmp_path / "adapter"), SPEECH.replace(methods=ROUTED.methods)
    params = random_params(cfg)
    checkpoints.save_hf(tmp_path, HEADLESS, {"encoder": split(cfg, params)[1]["encoder"]})
    checkpoints.save_adapter(adapter, cfg, params)
    for given in (None, SPEECH):
        found = load_model(str(tmp_path), adapter_checkpoint=adapter, config=given)
        assert found.config == cfg.replace(dropout_rate=0.0)
        assert_same_tree(found.params, params)
    with pytest.raises(ValueError, match=r"vocab_size=30, not 20$"):
        given = SPEECH.replace(vocab_size=30)
        load_model(str(tmp_path), adapter_checkpoint=adapter, config=given)


def test_an_adapter_of_another_vocabulary_than_the_bases_is_refused(tmp_path):
    base = tmp_path / "base"
    vocabulary_of = {"same": find_fingerprint(bundled.VOCABULARY), "other": "0" * 64}.get
    for name in ("same", "other", "unknown"):
        save(base, ROUTED, adapter=tmp_path / name, vocabulary=vocabulary_of(name))
    folders = {name: str(tmp_path / name) for name in ("same", "other", "unknown")}
    load_model(str(base), adapter_checkpoint=folders["other"])  # the base does not know its own
    (base / "spiece.model").write_bytes((bundled.VOCABULARY / "spiece.model").read_bytes())
    for name, known in (("same", {folders["same"]: vocabulary_of("same")}), ("unknown", None)):
        assert load_model(str(base), adapter_checkpoint=folders[name]).adapter == known
    with pytest.raises(ValueError, match=f"another vocabulary than that of {base} .*0000, "):
        load_model(str(base), adapter_checkpoint=folders["other"])


@pytest.mark.parametrize(
    "values",
    [
        {"head": "regression", "labels": (), "pooling": "first"},
        {"head": "classification", "labels": ("no", "yes"), "pooling": "mean"},
    ],
)
def test_the_head_of_an_adapter_takes_precedence(values, tmp_path):
    cfg = TINY.encoder_only().replace(methods=(ADAPTER,), **values)
    adapter, base, params = str(tmp_path / "adapter"), str(tmp_path / "base"), random_params(cfg)
    dense = {name: x for name, x in split(cfg, params)[1].items() if name != "head"}
    checkpoints.save_hf(base, TINY.encoder_only(), dense)
    checkpoints.save_adapter(adapter, cfg, params)
    assert head(adapter_checkpoint=adapter) == values
    assert head(values["head"], values["pooling"], "unread", adapter) == values
    found = load_model(base, adapter_checkpoint=adapter, head=head(adapter_checkpoint=adapter))
    assert {name: getattr(found.config, name) for name in values} == values
    with pytest.raises(ValueError, match=f"{adapter} has pooling='{values['pooling']}', not 'x'"):
        head(pooling="x", adapter_checkpoint=adapter)


def test_a_fresh_head_is_as_it_is_asked_for(saved, tmp_path):
    (tmp_path / "train").write_text('{"inputs": "a", "label": "x"}\n{"inputs": "a", "label": "b"}')
    made = {"head": "classification", "labels": ("b", "x"), "pooling": "mean"}
    for adapter in (None, saved[1]):  # the second has no head
        assert head(train_file=tmp_path / "train", adapter_checkpoint=adapter) == made
    assert head("regression", "first") == {"head": "regression", "labels": (), "pooling": "first"}
    with pytest.raises(ValueError, match="read from TRAIN_FILE: name it"):
        head()
