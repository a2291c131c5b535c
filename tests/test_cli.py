"""The command line and the gin files: each parses, and the steps of the README work."""

import functools
import json
import pathlib
import re

import gin
from helpers import ADAPTER, config, random_params
import jax
import numpy as np
import pytest

from coda_jax import batches as batches_lib
from coda_jax import bench, checkpoints, cli, gin_configs, runs, training
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.models import EncoderDecoder
from coda_jax.network import init_params
from coda_jax.routing import CodaConfig

FOLDER = pathlib.Path(next(iter(gin_configs.__path__)))
REQUIRED = {
    "MODEL_DIR": "'unused'",
    "INITIAL_CHECKPOINT_PATH": "'unused'",
    "MIXTURE_OR_TASK_NAME": "'stdlib_module'",
    "INPUT": "'-'",
    "OUTPUT": "'-'",
    "TASK_FEATURE_LENGTHS": "{'inputs': 8, 'targets': 4}",
    "TRAIN_STEPS": "100",
    "LEARNING_RATE": "0.1",
}
CONFIG = config(vocab_size=384)


@gin.configurable
def method(adapter, coda, trained):
    """What a method file binds."""
    return adapter, coda, trained


@pytest.fixture(autouse=True)
def clean_gin():
    """Leaves no configuration behind."""
    yield
    gin.clear_config()


def files(folder):
    """The gin files of a folder, under the short names that the command line takes."""
    return sorted(str(path.relative_to(FOLDER)) for path in (FOLDER / folder).glob("*.gin"))


def test_every_gin_file_is_in_a_folder_that_is_tested():
    folders = ("models", "methods", "runs", "tasks", "experiments", "t5x")  # t5x: test_t5x.py
    tested = [file for folder in folders for file in files(folder)]
    assert sorted(tested) == sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.gin"))


# As published with the checkpoints.
PARAMETERS = {
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_3b": 2_851_598_336,
    "t5_1_0_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "pix2struct_base": 282_285_696,
    "pix2struct_large": 1_336_107_264,
    "w2v_bert_large": 580_493_120 - 1024 + 384 * 1025,  # a head, and no vector of masked frames
}


def count_parameters(cfg):
    """Of a model of any depth, from one with a single layer in encoder and decoder."""
    layers = {"encoder": cfg.num_encoder_layers, "decoder": cfg.num_decoder_layers}
    shallow = cfg.replace(**{f"num_{stack}_layers": min(n, 1) for stack, n in layers.items()})
    shapes = jax.eval_shape(functools.partial(init_params, shallow.network()), jax.random.key(0))
    return params_lib.count(shapes) + sum(
        (n - 1) * params_lib.count(shapes[stack]["layers_0"]) for stack, n in layers.items() if n
    )


@pytest.mark.parametrize("name", files("models"))
def test_models_have_the_sizes_that_they_say_or_require_them(name):
    if "gin.REQUIRED" in (FOLDER / name).read_text():
        with pytest.raises(ValueError, match=r"(vocab_size|emb_dim) set to .%gin\.REQUIRED"):
            cli.configure([name], [], [])
        return
    cli.configure([name], [], [])
    count = count_parameters(gin.query_parameter("%CONFIG").scoped_configurable_fn())
    known = pathlib.Path(name).stem.replace("flan_t5", "t5_1_1")
    assert count == PARAMETERS.get(known, count)
    assert 1_000_000 < count < 14_000_000_000


@pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family in bench.SIZES for size in bench.SIZES[family]]
)
def test_the_bench_has_the_sizes_of_the_gin_files(family, size):
    kind, _ = bench.FAMILIES[family]
    cli.configure([f"models/{family}_{size}.gin"], [], [f"{kind.__name__}.dropout_rate=0.0"])
    assert gin.get_configurable(kind)() == bench.published(family, size)


@pytest.mark.parametrize("name", files("methods"))
def test_methods_make_a_model(name):
    bindings = ["adapter=%ADAPTER", "coda=%CODA", "trained=%TRAINED"]
    cli.configure([name], [], [f"method.{binding}" for binding in bindings])
    adapter, coda, trained = method()
    cfg = config(adapter=adapter, coda=coda)
    shapes = jax.eval_shape(EncoderDecoder(cfg).init, jax.random.key(0))
    layer = shapes["encoder"]["layers_0"]
    assert ("adapter" in layer) == (adapter is not None) == ("full" not in name)
    assert (coda is not None) == ("coda" in name)
    assert ("router" in layer) == ("coda" in name and "truncation" not in name)
    assert trained == (
        "all" if name in ("methods/full.gin", "methods/coda_pretrain.gin") else "adapters"
    )


VARIANTS = {
    "k_to_all": {"attention": "k_to_all"},
    "sigmoid": {"routing": "sigmoid"},
    "truncation": {"routing": "truncation"},
    "iterative": {"solver": "iterative"},
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants_of_the_method_change_what_they_say(name):
    cli.configure([f"methods/coda_{name}.gin"], [], [])
    assert gin.get_configurable(CodaConfig)() == CodaConfig(**VARIANTS[name])


@pytest.mark.parametrize("name", files("experiments"))
def test_experiments_are_what_their_names_say(name):
    parts = re.fullmatch(r"(\w+?)_(base|large|xl)_(.+)", pathlib.Path(name).stem)
    if parts is None:  # what the others share
        return
    task, size, what = parts.groups()
    bindings = ["VOCABULARY='bytes'", "INITIAL_CHECKPOINT_PATH='unused'"]
    bindings += ["method.adapter=%ADAPTER", "method.coda=%CODA", "method.trained=%TRAINED"]
    cli.configure([name], [], bindings)
    found = gin.query_parameter("%CONFIG").scoped_configurable_fn()
    family = {"t5": "t5_1_1", "wav2vec2-bert": "w2v_bert"}.get(found.family, found.family)
    assert count_parameters(found) == PARAMETERS[f"{family}_{size}"]
    registered = gin.query_parameter("%MIXTURE_OR_TASK_NAME").scoped_configurable_fn()
    assert registered.startswith("c4" if task == "pretrain" else task)
    adapter, coda, trained = method()
    assert adapter == AdapterConfig()
    assert trained == ("all" if task == "pretrain" else "adapters")
    if what == "parallel_adapter":
        assert coda is None
    else:
        reduction, _, variant = what.removeprefix("r").partition("_")
        assert coda == CodaConfig(reduction=int(reduction), **VARIANTS.get(variant, {}))


@pytest.mark.parametrize("name", files("runs"))
def test_runs_parse_with_what_they_require(name):
    text = "".join(
        (FOLDER / file).read_text() for file in (name, "runs/train.gin", "runs/infer.gin")
    )
    bindings = [
        f"{macro}={value}" for macro, value in REQUIRED.items() if f"{macro} = %gin" in text
    ]
    cli.configure(["methods/coda.gin", name], [], bindings)
    if "train.gin" in (FOLDER / name).read_text() or name == "runs/train.gin":
        options = gin.get_configurable(training.TrainOptions)()
        assert options.total_steps >= 100


@pytest.mark.parametrize("name", files("tasks"))
def test_tasks_name_a_registered_task(name, tmp_path):
    import seqio

    lines = [json.dumps({"inputs": "a", "targets": "b"})] * 3
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    bindings = ["cache.task=%MIXTURE_OR_TASK_NAME", f"TRAIN_FILE='{tmp_path}/train.jsonl'"]
    bindings += ["DIRECTORY='unused'"] * ("DIRECTORY = " in (FOLDER / name).read_text())
    cli.configure(["runs/cache.gin", name], [], [*bindings, "VOCABULARY='bytes'", "OUTPUT='x'"])
    reference = gin.query_parameter("%MIXTURE_OR_TASK_NAME")
    name = reference if isinstance(reference, str) else reference.scoped_configurable_fn()
    assert seqio.get_mixture_or_task(name).output_features.keys() == {"inputs", "targets"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--gin.NO_SUCH_MACRO"], "unknown arguments: --gin.NO_SUCH_MACRO"),
        (["train", "--steps=3"], "unknown arguments: --steps=3"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_bad_command_lines_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["load_model.checkpoit='x'"], "checkpoit"),
        (["no_such_function.x=1"], "no_such_function"),
        (["REDUCTION=0.5"], "reduction must be a finite number >= 1, got 0.5"),
    ],
)
def test_gin_names_and_values_that_do_not_exist_are_named(bindings, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        required = ["INPUT='-'", "INITIAL_CHECKPOINT_PATH='unused'"]
        cli.configure(["runs/predict.gin", "methods/coda.gin"], [], [*bindings, *required])
        gin.get_configurable(CodaConfig)()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny dense checkpoint of bytes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save_hf(directory, CONFIG, random_params(CONFIG))
    return directory


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """JSONL files: a word and its first letter."""
    directory = tmp_path_factory.mktemp("jsonl")
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("validation", 6)):
        words = ["".join(rng.choice(list("abcdef"), 5)) for _ in range(count)]
        lines = [json.dumps({"inputs": word, "targets": word[0]}) for word in words]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def arguments(checkpoint, jsonl):
    """What the commands share."""
    return [
        "--gin_file=tasks/jsonl.gin",
        f"--gin.TRAIN_FILE='{jsonl}/train.jsonl'",
        f"--gin.VALIDATION_FILE='{jsonl}/validation.jsonl'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{checkpoint}'",
        "--gin.VOCABULARY='bytes'",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
        "--gin.BATCH_SIZE=4",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint, jsonl):
    """A run of `coda train` with CoDA."""
    directory = tmp_path_factory.mktemp("run")
    status = cli.main(
        [
            "train",
            "--gin_file=runs/finetune.gin",
            "--gin_file=methods/coda.gin",
            *arguments(checkpoint, jsonl),
            f"--gin.MODEL_DIR='{directory}'",
            "--gin.TRAIN_STEPS=24",
            "--gin.AdapterConfig.bottleneck=4",
        ]
    )
    gin.clear_config()
    assert status == 0
    return directory


def test_train_exports_an_adapter_for_the_checkpoint(trained, checkpoint):
    _, base = checkpoints.load_hf(checkpoint)
    cfg, _ = checkpoints.load_adapter(trained / "export" / "adapter", base)
    assert cfg.coda == CodaConfig(reduction=3)
    assert cfg.adapter == AdapterConfig(bottleneck=4)
    assert "exact_match" in json.loads((trained / "metrics.json").read_text())


def test_evaluate_agrees_with_the_evaluation_during_training(trained, checkpoint, jsonl, tmp_path):
    output = tmp_path / "metrics.json"
    cli.main(
        [
            "evaluate",
            "--gin_file=runs/evaluate.gin",
            *arguments(checkpoint, jsonl),
            f"--gin.INITIAL_ADAPTER_PATH='{trained}/export/adapter'",
            f"--gin.OUTPUT='{output}'",
            "--gin.Decoding.max_decode_length=4",
        ]
    )
    (metrics,) = json.loads(output.read_text()).values()
    during = json.loads((trained / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(100 * during["exact_match"], abs=1e-4)


def test_predict_answers_in_order(trained, checkpoint, tmp_path):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    texts = ["fade", "a much longer input", "b"]
    source.write_text("\n".join(texts) + "\n")
    cli.main(
        [
            "predict",
            "--gin_file=runs/predict.gin",
            f"--gin.INITIAL_CHECKPOINT_PATH='{checkpoint}'",
            f"--gin.INITIAL_ADAPTER_PATH='{trained}/export/adapter'",
            "--gin.VOCABULARY='bytes'",
            f"--gin.INPUT='{source}'",
            f"--gin.OUTPUT='{output}'",
            "--gin.REDUCTION=2",
            "--gin.Decoding.max_decode_length=4",
        ]
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["inputs"] for line in lines] == texts
    assert all(isinstance(line["prediction"], str) for line in lines)


def test_cache_then_train_gives_the_parameters_of_training_from_the_task(
    trained, checkpoint, jsonl, tmp_path
):
    shared = arguments(checkpoint, jsonl)
    cli.main(
        ["cache", "--gin_file=runs/cache.gin", *shared, f"--gin.OUTPUT='{tmp_path}/train.npz'"]
    )
    examples, metadata = batches_lib.read_cache(tmp_path / "train.npz")
    assert len(examples) == 24
    assert metadata["vocabulary"] == "bytes"
    model = runs.load_model(str(checkpoint), adapter=ADAPTER)
    data = runs.Data({"inputs": 8, "targets": 4}, cache=str(tmp_path / "train.npz"), batch_size=4)
    batch = next(iter(data.batches(model.config, repeat=True)))
    assert batch["encoder_input_tokens"].shape == (4, 8)


def test_a_checkpoint_of_another_vocabulary_is_refused(checkpoint):
    model = runs.load_model(str(checkpoint))
    import coda_jax.tasks.offline  # noqa: F401

    with pytest.raises(ValueError, match="4096 ids, the model only 384"):
        runs.Data({"inputs": 8, "targets": 4}, task="stdlib_module").check_vocabulary(model)


def test_load_model_refuses_what_contradicts_itself(trained, checkpoint):
    adapter = str(trained / "export" / "adapter")
    with pytest.raises(ValueError, match="needs a checkpoint or"):
        runs.load_model()
    computed = CONFIG.replace(dropout_rate=0.5, dtype="bfloat16")
    assert runs.load_model(str(checkpoint), config=computed).config.dtype == np.float32
    with pytest.raises(ValueError, match=r"emb_dim=32, not 16; mlp_dim=8, not 24"):
        runs.load_model(str(checkpoint), config=CONFIG.replace(emb_dim=32, mlp_dim=8))
    with pytest.raises(ValueError, match="does not route"):
        runs.load_model(str(checkpoint), adapter=ADAPTER, reduction=3)
    with pytest.raises(ValueError, match="bottleneck=4"):
        runs.load_model(str(checkpoint), adapter_checkpoint=adapter, adapter=AdapterConfig(8))
    assert runs.load_model(
        str(checkpoint), adapter_checkpoint=adapter, reduction=5
    ).config.coda == CodaConfig(reduction=5)
