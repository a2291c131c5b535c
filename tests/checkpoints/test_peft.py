"""LoRA files of the library peft: its own outputs, and files that it reads."""

import importlib.util
import json
import shutil

from helpers import ADAPTER, GOLDEN, TINY, golden_logits, random_params
import jax
import numpy as np
import pytest

from coda_jax import checkpoints, trees
from coda_jax.checkpoints.peft import CONFIG, TENSORS
from coda_jax.checkpoints.tensor_files import read_tensors, write_tensors
from coda_jax.methods import Coda, Lora, partition

CASES = ("usual", "dora", "one_layer")
TARGETS = {
    "usual": (
        r"^decoder/layers_\d+/encoder_decoder_attention/query$",
        r"^decoder/layers_\d+/encoder_decoder_attention/value$",
        r"^decoder/layers_\d+/self_attention/query$",
        r"^decoder/layers_\d+/self_attention/value$",
        r"^encoder/layers_\d+/attention/query$",
        r"^encoder/layers_\d+/attention/value$",
    ),
    "one_layer": (
        "^encoder/layers_1/attention/query$",
        "^encoder/layers_1/mlp/wo$",
    ),
}


@pytest.fixture(name="base", scope="module")
def fixture_base():
    return checkpoints.load_hf(GOLDEN / "v1_1")


def assert_same_logits(found, golden):
    seen = golden["decoder_targets"] > 0  # ours are masked where there is no target
    np.testing.assert_allclose(found[seen], golden["logits"][seen], atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(name, base):
    folder = GOLDEN / "peft" / name
    config, params = checkpoints.load_peft(folder, *base)
    (lora,) = config.methods
    assert lora.rank_stabilized == lora.weight_decomposed == (name == "dora")
    if name in TARGETS:
        assert lora.targets == TARGETS[name]
    golden = np.load(folder / "logits.npz")
    assert_same_logits(golden_logits(config, params, golden), golden)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_has_the_tensors_that_were_loaded(name, base, tmp_path):
    """By name and value; the config selects the same modules."""
    folder = GOLDEN / "peft" / name
    checkpoints.save_peft(tmp_path, *checkpoints.load_peft(folder, *base), base="a/base")
    found, expected = read_tensors(tmp_path / TENSORS), read_tensors(folder / TENSORS)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_allclose(found[tensor], value, rtol=1e-6, atol=1e-6, err_msg=tensor)
    fields, theirs = (json.loads((x / CONFIG).read_text()) for x in (tmp_path, folder))
    assert fields["base_model_name_or_path"] == "a/base"
    for field in ("r", "lora_alpha", "use_dora", "use_rslora", "bias", "peft_type"):
        assert fields[field] == theirs[field], field
    if name == "usual":
        assert sorted(fields["target_modules"]) == sorted(theirs["target_modules"])
    again = checkpoints.load_peft(tmp_path, *base)
    assert again[0] == checkpoints.load_peft(folder, *base)[0]


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_is_saved(name, base, tmp_path):
    """Live, where torch, transformers and peft are installed: fresh values, equal logits."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    import peft
    import transformers

    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden_peft.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GOLDEN))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    config, params = checkpoints.load_peft(GOLDEN / "peft" / name, *base)
    rng = np.random.default_rng(7)
    params = trees.unflatten(
        {
            path: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) * ("lora" in path)
            for path, leaf in trees.flatten(params).items()
        }
    )
    checkpoints.save_peft(tmp_path, config, params)
    model = transformers.T5ForConditionalGeneration.from_pretrained(GOLDEN / "v1_1")
    model = peft.PeftModel.from_pretrained(model, tmp_path)
    golden = dict(np.load(GOLDEN / "peft" / name / "logits.npz"))
    golden["logits"] = module.logits(model, golden)
    assert_same_logits(golden_logits(config, params, golden), golden)


def changed(tmp_path, **fields):
    """A copy of the usual folder with other fields in its config."""
    folder = shutil.copytree(GOLDEN / "peft" / "usual", tmp_path / "changed")
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "is of peft_type='IA3'; LORA alone is read"),
        ({"modules_to_save": ["lm_head"]}, r"has not: {'modules_to_save': \['lm_head'\]}"),
        ({"rank_pattern": {"q": 2}}, "has not: {'rank_pattern': {'q': 2}}"),
        ({"bias": "lora_only"}, "has not: {'bias': 'lora_only'}"),
        ({"fan_in_fan_out": True}, "has not: {'fan_in_fan_out': True}"),
        ({"init_lora_weights": "pissa"}, "has not: {'init_lora_weights': 'pissa'}"),
        ({"of_tomorrow": 3}, "has not: {'of_tomorrow': 3}"),
        ({"r": 5}, "wrong shape: decoder/layers_0/encoder_decoder_attention/query/lora_a"),
        ({"use_dora": True}, "missing: .*lora_magnitude"),
    ],
)
def test_what_lora_has_not_is_refused(fields, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.load_peft(changed(tmp_path, **fields), *base)


def test_tensors_of_another_model_and_lost_ones_are_refused(base, tmp_path):
    folder = changed(tmp_path)
    tensors = {name: np.array(x) for name, x in read_tensors(folder / TENSORS).items()}
    name = next(iter(tensors))
    write_tensors(folder / TENSORS, {**tensors, name.replace("block.0", "block.9"): tensors[name]})
    with pytest.raises(ValueError, match=r"tensors of no projection of the base: .*block\.9"):
        checkpoints.load_peft(folder, *base)
    write_tensors(folder / TENSORS, {key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"missing: .*lora_a"):
        checkpoints.load_peft(folder, *base)
    (folder / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        checkpoints.load_peft(folder, *base)


def test_what_all_projections_have_is_read_again(base, tmp_path):
    config = base[0].replace(methods=(Lora(rank=2, targets=(".*",)),))
    params = trees.merge(partition(config, random_params(config))[0], base[1])
    checkpoints.save_peft(tmp_path / "new", config, params)
    _, found = checkpoints.load_peft(tmp_path / "new", *base)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_magnitudes_of_another_width_are_refused(base, tmp_path):
    wider = base[0].replace(emb_dim=2 * base[0].emb_dim)
    config = wider.replace(methods=(Lora(rank=2, targets=("out$",), weight_decomposed=True),))
    checkpoints.save_peft(tmp_path / "new", config, random_params(config))
    with pytest.raises(ValueError, match="lora_magnitude has the shape"):
        checkpoints.load_peft(tmp_path / "new", *base)


@pytest.mark.parametrize("methods", [(ADAPTER,), (Lora(), Coda()), ()])
def test_other_methods_are_not_saved(methods, tmp_path):
    config = TINY.replace(methods=methods)
    with pytest.raises(ValueError, match=r"peft's files hold \['lora'\] alone, and the model has"):
        checkpoints.save_peft(tmp_path / "new", config, random_params(config))
    assert not (tmp_path / "new").exists()


def test_an_adapter_file_is_asked_for_by_name(base):
    """Where a run is given peft's folder."""
    with pytest.raises(FileNotFoundError, match=r"is of the library peft: coda convert"):
        checkpoints.load_adapter(GOLDEN / "peft" / "usual", *base)
