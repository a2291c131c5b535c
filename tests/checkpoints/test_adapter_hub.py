"""Bottleneck files of the library adapters: its own outputs, and files that it reads."""

import importlib.util
import json
import shutil

from helpers import ADAPTER, GOLDEN, TINY, TINY_IMAGES, TINY_SPEECH, golden_logits, random_params
import numpy as np
import pytest

from coda_jax import checkpoints, trees
from coda_jax.checkpoints.adapter_hub import TENSORS, TORCH_TENSORS
from coda_jax.checkpoints.peft import CONFIG
from coda_jax.checkpoints.tensor_files import read_tensors, write_tensors
from coda_jax.methods import Coda, HoulsbyAdapter

FOLDER = GOLDEN / "adapters_library"
CASES = {  # what each is of ours
    "double_seq_bn": ("output", "swish", 6),
    "cross": ("output", "gelu", 4),
    "seq_bn": ("sum", "relu", 3),
    "plus": ("sum", "tanh", 4),
    "par_bn": ("input", "relu", 8),
    "scaled_par_bn": ("input", "leaky_relu", 3),
}
USUAL = ("seq_bn", "par_bn")  # by default, in each format of weights
SOME = [n if n in USUAL else pytest.param(n, marks=pytest.mark.all) for n in CASES]
TARGETS = {
    "double_seq_bn": {"attention", "self_attention", "mlp"},
    "cross": {"attention", "self_attention", "encoder_decoder_attention", "mlp"},
    "seq_bn": {"mlp"},
}


@pytest.fixture(name="base", scope="module")
def fixture_base():
    return checkpoints.load_hf(GOLDEN / "v1_1")


def assert_same_logits(found, golden):
    seen = golden["decoder_targets"] > 0  # ours are masked where there is no target
    np.testing.assert_allclose(found[seen], golden["logits"][seen], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_logits_are_those_of_the_library(name, base):
    config, params = checkpoints.load_adapter_hub(FOLDER / name, *base)
    (method,) = config.methods
    assert (method.reads, method.activation, method.bottleneck) == CASES[name]
    assert method.use_bias and not method.train_norms
    if name in TARGETS:
        paths = [path for path in trees.flatten(params) if path.endswith("houlsby/wi/kernel")]
        assert {path.split("/")[2] for path in paths} == TARGETS[name]
    golden = np.load(FOLDER / name / "logits.npz")
    found = golden_logits(config, params, golden)
    assert_same_logits(found, golden)
    if name not in USUAL:
        assert np.abs(found - golden_logits(*base, golden)).max() > 0.1  # it does something


@pytest.mark.parametrize("name", SOME)
def test_what_is_saved_is_what_was_loaded(name, base, tmp_path):
    """Its options, too, but a scaling, which is multiplied into the weights."""
    loaded = checkpoints.load_adapter_hub(FOLDER / name, *base)
    checkpoints.save_adapter_hub(tmp_path, *loaded, name="mine", base="a/base")
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert (raw["name"], raw["model_name"]) == ("mine", "a/base")
    theirs = json.loads((FOLDER / name / CONFIG).read_text())["config"]
    for field in ("mh_adapter", "cross_adapter", "output_adapter", "is_parallel", "leave_out"):
        assert raw["config"][field] == theirs[field], field
    again = checkpoints.load_adapter_hub(tmp_path, *base)
    assert again[0] == loaded[0]
    for path, leaf in trees.flatten(again[1]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(loaded[1])[path], err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_the_library_reads_what_is_saved(name, base, tmp_path):
    """Live, where torch and adapters are installed: fresh values, equal logits."""
    for module in ("torch", "transformers", "adapters"):
        pytest.importorskip(module)
    import adapters
    import transformers

    file = GOLDEN / "make_golden_adapters_library.py"
    spec = importlib.util.spec_from_file_location("make_golden_adapters_library", file)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GOLDEN))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    config, params = checkpoints.load_adapter_hub(FOLDER / name, *base)
    rng = np.random.default_rng(7)
    params = trees.unflatten(
        {
            path: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) * ("wo" in path)
            if "houlsby" in path
            else leaf
            for path, leaf in trees.flatten(params).items()
        }
    )
    checkpoints.save_adapter_hub(tmp_path, config, params)
    model = transformers.T5ForConditionalGeneration.from_pretrained(GOLDEN / "v1_1")
    adapters.init(model)
    model.set_active_adapters(model.load_adapter(str(tmp_path), use_safetensors=True))
    golden = dict(np.load(FOLDER / name / "logits.npz"))
    golden["logits"] = module.logits(model, golden)
    assert_same_logits(golden_logits(config, params, golden), golden)


def changed(tmp_path, top=None, without=(), **fields):
    """A copy of a folder with other fields in its config."""
    folder = shutil.copytree(FOLDER / "double_seq_bn", tmp_path / "changed")
    raw = json.loads((folder / CONFIG).read_text())
    config = {name: x for name, x in {**raw["config"], **fields}.items() if name not in without}
    (folder / CONFIG).write_text(json.dumps({**raw, "config": config, **(top or {})}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ln_after": True}, "has not: {'ln_after': True}"),
        ({"ln_before": True}, "has not: {'ln_before': True}"),
        ({"use_gating": True}, "has not: {'use_gating': True}"),
        ({"phm_layer": True}, "has not: {'phm_layer': True}"),
        ({"inv_adapter": "nice"}, "has not: {'inv_adapter': 'nice'}"),
        ({"of_tomorrow": 3}, "has not: {'of_tomorrow': 3}"),
        ({"non_linearity": "gelu"}, "non_linearity='gelu', which is none of ours"),
        ({"original_ln_after": False}, r"'original_ln_after': False.*; right is original_ln_after"),
        ({"residual_before_ln": "post_add"}, r"'residual_before_ln': 'post_add'.*right is"),
        (
            {"original_ln_before": True, "residual_before_ln": False},
            r"'residual_before_ln': False.*; right is original_ln_after=True",
        ),
        ({"architecture": "lora"}, "is of architecture='lora'; bottlenecks alone are read"),
        ({"architecture": {}}, "is of architecture={}; bottlenecks"),
        ({"residual_before_ln": []}, r"'residual_before_ln': \[\].*right is"),
        ({"leave_out": 3}, "has leave_out=3, which is no list"),
        ({"reduction_factor": 1e-320}, "of no use for decoder/layers_0/"),
        ({"reduction_factor": {"0": 2, "default": 4}}, r"of the widths \[6, 12\]; ours have one"),
        ({"reduction_factor": {"0": 2}}, "of no use for decoder/layers_0/"),
        ({"reduction_factor": 2}, r"wrong shape: .*houlsby/wi/kernel is \(24, 6\)"),
        ({"cross_adapter": True}, "differ in where adapters are: .*encoder_decoder_attention"),
        ({"leave_out": [0]}, "differ in where adapters are: .*encoder/layers_0/attention"),
        ({"scaling": "of_tomorrow"}, "has scaling='of_tomorrow'"),
        ({"scaling": "learned"}, "'learned', but an adapter has no tensor of it"),
        ({"top": {"model_type": "bert"}}, "is of model_type='bert'; the base is one of"),
        ({"top": {"name": "another"}}, "tensors of no bottleneck of the base: .*adapter_down"),
        ({"top": {"config": "pfeiffer"}}, "has no options of an adapter: config='pfeiffer'"),
        ({"without": ["mh_adapter"]}, r"lacks \['mh_adapter'\]"),
    ],
)
def test_what_ours_do_not_compute_is_refused(fields, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.load_adapter_hub(changed(tmp_path, **fields), *base)


def test_factors_of_another_width_are_refused(base, tmp_path):
    folder = changed(tmp_path, scaling="channel")
    tensors = {name: np.array(x) for name, x in read_tensors(folder / TENSORS).items()}
    starts = {name.rpartition(".adapter_")[0] for name in tensors}
    tensors |= {f"{start}.scaling": np.ones(3, np.float32) for start in starts}
    write_tensors(folder / TENSORS, tensors)
    with pytest.raises(ValueError, match="has 3 factors for"):
        checkpoints.load_adapter_hub(folder, *base)


def test_files_of_old_versions_have_other_words_and_fewer_options(base, tmp_path):
    """Where no version is said, "gelu" is the tanh form; what is not said has its default."""
    folder = changed(
        tmp_path, non_linearity="gelu", without=["scaling", "cross_adapter", "dropout"]
    )
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: x for k, x in raw.items() if k != "version"}))
    assert checkpoints.load_adapter_hub(folder, *base)[0].methods[0].activation == "gelu"


def test_tensors_of_another_model_and_lost_ones_are_refused(base, tmp_path):
    folder = changed(tmp_path)
    tensors = {name: np.array(x) for name, x in read_tensors(folder / TENSORS).items()}
    name = next(iter(tensors))
    write_tensors(folder / TENSORS, {**tensors, name.replace("block.0", "block.9"): tensors[name]})
    with pytest.raises(ValueError, match=r"tensors of no bottleneck of the base: .*block\.9"):
        checkpoints.load_adapter_hub(folder, *base)
    write_tensors(folder / TENSORS, {key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"missing: .*houlsby/w"):
        checkpoints.load_adapter_hub(folder, *base)
    write_tensors(folder / TENSORS, {f"transformer.{key}": x for key, x in tensors.items()})
    checkpoints.load_adapter_hub(folder, *base)  # of the library's own classes of models
    (folder / "head_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has \['head_config.json'\], which is no part"):
        checkpoints.load_adapter_hub(folder, *base)
    (folder / TENSORS).unlink()
    (folder / "head_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        checkpoints.load_adapter_hub(folder, *base)


def test_weights_of_torch_are_read_without_torch():
    assert (FOLDER / "seq_bn" / TORCH_TENSORS).exists()
    assert not (FOLDER / "seq_bn" / TENSORS).exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY.replace(methods=(ADAPTER,)), r"hold \['houlsby_adapter'\] alone, and the model has"),
        (TINY.replace(methods=(HoulsbyAdapter(4, train_norms=False), Coda())), "alone, and the"),
        (TINY.replace(methods=(HoulsbyAdapter(4),)), "no place for it: .*norm/scale"),
        (
            TINY.replace(methods=(HoulsbyAdapter(4, "softplus", train_norms=False),)),
            "adapters has no 'softplus'",
        ),
        (
            TINY.replace(
                methods=(
                    HoulsbyAdapter(
                        4, targets=("layers_0/attention$", "layers_1/mlp$"), train_norms=False
                    ),
                )
            ),
            "no options for adapters behind",
        ),
        (
            TINY_SPEECH.replace(methods=(HoulsbyAdapter(4, train_norms=False),)),
            "has no sublayers of a 'wav2vec2-bert'",
        ),
        (
            TINY_IMAGES.replace(methods=(HoulsbyAdapter(4, train_norms=False),)),
            "has no sublayers of a 'pix2struct'",
        ),
    ],
)
def test_what_has_no_place_is_not_saved(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.save_adapter_hub(tmp_path / "new", config, random_params(config))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "width", [5, *(pytest.param(x, marks=pytest.mark.all) for x in (1, 7, 30))]
)
def test_every_width_has_a_reduction_factor(width, tmp_path):
    """Also one that does not divide D, of an adapter without biases."""
    config = TINY.replace(methods=(HoulsbyAdapter(width, train_norms=False),))
    params = random_params(config)
    checkpoints.save_adapter_hub(tmp_path, config, params)
    dense = {path: x for path, x in trees.flatten(params).items() if "houlsby" not in path}
    found, leaves = checkpoints.load_adapter_hub(tmp_path, config.dense(), trees.unflatten(dense))
    assert found.methods[0].bottleneck == width and found.methods[0].use_bias
    flat = trees.flatten(leaves)
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
    assert not any(flat[path].any() for path in flat if path.endswith("bias"))


def test_an_adapter_file_is_asked_for_by_name(base):
    """Where a run is given the library's folder."""
    with pytest.raises(FileNotFoundError, match=r"is of the library adapters: coda convert"):
        checkpoints.load_adapter(FOLDER / "seq_bn", *base)
