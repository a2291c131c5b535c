"""The gin files: each is parsed, and what it configures is made."""

import functools
import inspect
import json
import pathlib
import re
import sys

import gin
from helpers import T5X_SCRIPT, TINY
import optax
import pytest

from coda_jax import checkpoints, cli, hub, trees
from coda_jax.commands import COMMANDS, load, loading
from coda_jax.commands.command_lines import CommandLine
from coda_jax.commands.compare_plan import plan
from coda_jax.commands.gin_files import package_folder
from coda_jax.methods import METHODS, Coda, Full, Lora, Norms, ParallelAdapter, StructuredPruning
from coda_jax.models import param_shapes, preset, presets
from coda_jax.objectives import BestRQ, model_for
from coda_jax.training import schedules

shapes = functools.cache(param_shapes)
FOLDER = package_folder()
FOLDERS = ("methods", "runs", "tasks", "t5x")


def files(folder):
    """The gin files of a folder, under the short names that the command line takes."""
    return sorted(str(path.relative_to(FOLDER)) for path in (FOLDER / folder).glob("*.gin"))


def methods_of(names, *bindings):
    """The methods that gin files and bindings give `coda check`."""
    cli.configure(["runs/check.gin", *names], [], ["INITIAL_CHECKPOINT_PATH=unused", *bindings])
    return gin.get_configurable(loading.configured_methods)()


def test_every_gin_file_is_in_a_folder_that_is_tested():
    tested = ["preset.gin", *(file for folder in FOLDERS for file in files(folder))]
    assert sorted(tested) == sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.gin"))


# Files that are not named as the method that they give, with its defaults.
RECIPES = {
    "coda": (Coda(), ParallelAdapter()),
    "coda_k_to_all": (Coda(attention="k_to_all"), ParallelAdapter()),
    "coda_selected": (Coda(cross_attention="selected"), ParallelAdapter()),
    "coda_sigmoid": (Coda(routing="sigmoid"), ParallelAdapter()),
    "coda_truncation": (Coda(routing="truncation"), ParallelAdapter()),
    "coda_iterative": (Coda(solver="iterative"), ParallelAdapter()),
    "coda_pretrain": (Coda(), ParallelAdapter(), Full()),
    "coda_lora": (Lora(), Coda()),
    "dora": (Lora(weight_decomposed=True),),
    "structured_pruning": (StructuredPruning(), Norms()),
}


def test_every_method_has_a_recipe():
    assert {f"methods/{name}.gin" for name in METHODS} <= set(files("methods"))


@pytest.mark.parametrize("name", files("methods"))
def test_recipes_give_the_methods_that_they_are_named_after(name):
    stem = name.removeprefix("methods/").removesuffix(".gin")
    expected = RECIPES[stem] if stem in RECIPES else (METHODS[stem](),)
    assert methods_of([name]) == expected
    param_shapes(TINY.replace(methods=expected))


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
    shapes = param_shapes(shallow)
    return trees.count(shapes) + sum(
        (n - 1) * trees.count(shapes[stack]["layers_0"]) for stack, n in layers.items() if n
    )


@pytest.mark.parametrize("name", presets())
def test_presets_have_the_published_sizes(name):
    cli.configure(["preset.gin"], [], [f"PRESET={name}"])
    found = gin.query_parameter("%CONFIG").scoped_configurable_fn()
    assert found == preset(name)
    count = count_parameters(found)
    assert count == PARAMETERS.get(name.replace("flan_t5", "t5_1_1"), count)
    assert 1_000_000 < count < 14_000_000_000


def test_the_published_sizes_are_presets():
    assert PARAMETERS.keys() <= presets().keys()


def test_some_fields_of_a_preset_may_be_replaced():
    cli.configure(["preset.gin"], [], ["PRESET=t5_1_1_base", "PRESET_CHANGES={'vocab_size': 1000}"])
    expected = preset("t5_1_1_base", vocab_size=1000)
    assert gin.get_configurable(loading.configured_preset)() == expected


def test_without_a_preset_there_is_no_config():
    cli.configure(["preset.gin"], [], [])
    assert gin.get_configurable(loading.configured_preset)() is None


def test_sizes_of_ones_own_can_be_written_in_a_gin_file(tmp_path):
    (tmp_path / "own.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from coda_jax.models.t5 import config as t5\n"
        "CONFIG = @t5.T5Config()\n"
        "t5.T5Config.vocab_size = 77\n"
    )
    bindings = ["INITIAL_CHECKPOINT_PATH=unused"]
    cli.configure(["runs/check.gin", str(tmp_path / "own.gin")], [], bindings)
    config = gin.get_bindings(load("check"))["config"]
    assert (config.family, config.vocab_size) == ("t5", 77)


REQUIRED = {
    "LAYOUT": "hf",
    "MODEL_DIR": "unused",
    "INITIAL_CHECKPOINT_PATH": "unused",
    "MIXTURE_OR_TASK_NAME": "stdlib_module",
    "INPUT": "-",
    "OUTPUT": "-",
    "TASK_FEATURE_LENGTHS": "{'inputs': 8, 'targets': 4}",
    "TRAIN_STEPS": "100",
    "LEARNING_RATE": "0.1",
    "BEST_METRIC": "training_eval/task/loss",
}
KINDS = {"rendered_text": "pix2struct_tiny", "spoken": "w2v_bert_tiny", "best_rq": "w2v_bert_tiny"}
OWN_TEXTS = f"TEXTS={FOLDER}/*.gin"  # which are read by tasks that do not say where theirs are


def including(name):
    """A gin file's text, with that of the files that it includes."""
    text = (FOLDER / name.removeprefix("coda_jax/gin_configs/")).read_text()
    included = re.findall(r"^include '(coda_jax/gin_configs/[^']+)'", text, re.MULTILINE)
    return "".join([*map(including, included), text])


def bindings_of_run(name, monkeypatch, *more):
    """(arguments of the command of runs/NAME.gin, made without reading or computing anything)."""
    kind = next((preset for word, preset in KINDS.items() if word in name), None)
    stored = TINY if kind is None else preset(kind)
    monkeypatch.setattr(hub, "find", pathlib.Path)
    monkeypatch.setattr(checkpoints, "load_hf", lambda _: (stored, shapes(stored)))
    monkeypatch.setattr(checkpoints, "swap_in", lambda config, *_: shapes(config))
    monkeypatch.setattr(loading, "init_params", lambda config, _: shapes(config))
    text = including(name)
    given = {binding.partition("=")[0] for binding in more}
    needed = [
        f"{x}={value}"
        for x, value in REQUIRED.items()
        if f"{x} = %gin.REQUIRED" in text and x not in given
    ]
    if "TEXTS = None" in text:
        needed += [OWN_TEXTS, "VOCABULARY=bytes"]
    if name == "runs/train.gin":  # which others include, with a checkpoint or a preset
        needed.append("INITIAL_CHECKPOINT_PATH=unused")
    command = re.findall(r"^(\w+)\.(\1):", text, re.MULTILINE)[-1][0]
    recipe = [] if "gin_configs/methods/" in text or command != "train" else ["methods/coda.gin"]
    cli.configure([name, *recipe], [], [*needed, *more])
    return command, gin.get_bindings(load(command))


SHARED = ("runs/infer.gin",)  # included by others, of no command of its own


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.all] * (name == "runs/demo.gin"))
        for name in files("runs")
        if name not in SHARED
    ],
)
def test_runs_make_the_arguments_of_their_command(name, monkeypatch):
    command, arguments = bindings_of_run(name, monkeypatch)
    passed_on = {"given": None} if COMMANDS[command].runs_others else {}
    inspect.signature(load(command)).bind(**arguments, **passed_on)
    if command != "train":
        assert name == f"runs/{command}.gin" or passed_on
        return
    assert arguments["options"].total_steps >= 100
    assert arguments["data"].limits().keys() == {"inputs", "targets"}
    assert (arguments["data"].split, arguments["eval_data"].split) == ("train", "validation")
    assert not arguments["eval_data"].shuffle
    rate = arguments["learning_rate"]
    rates = [rate(step) for step in (1, 99)] if callable(rate) else [rate]
    assert all(0 < value < 1 for value in rates)
    made = arguments["optimizer"](learning_rate=arguments["learning_rate"])
    assert isinstance(made, optax.GradientTransformation)
    config = arguments["model"].config
    assert config.methods == pretrained_methods(name)
    arguments["objective"](config)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("demo", marks=pytest.mark.all),
        "demo_vision",
        "demo_speech",
        "ablations",
        "methods",
        "methods_vision",
        "methods_speech",
        "pruning",
        "pruning_vision",
        "ood_methods",
    ],
)
def test_what_the_package_compares_is_configured(name, monkeypatch, tmp_path):
    _, arguments = bindings_of_run(f"runs/{name}.gin", monkeypatch)
    passed_on = {"recipes", "seeds", "training", "evaluation"}
    own = {key: value for key, value in arguments.items() if key in passed_on}
    cells = plan(tmp_path, given=CommandLine(), **own)  # configures them
    assert [*dict.fromkeys(cell.recipe for cell in cells)] == [*arguments["recipes"]]
    for cell in cells:
        assert int(cell.training.bindings["TRAIN_STEPS"]) >= 100
        assert pathlib.Path(cell.training.bindings["INITIAL_CHECKPOINT_PATH"]).is_dir()


@pytest.mark.parametrize("name", [name for name in files("runs") if "pretrain" in name])
@pytest.mark.parametrize("steps", [1, 10, 20])
def test_the_warm_up_follows_the_length_of_the_run(name, steps, monkeypatch):
    bindings_of_run(name, monkeypatch, f"TRAIN_STEPS={steps}")
    rate = gin.get_configurable(schedules.warmup_cosine)()
    rates = [float(rate(step)) for step in range(steps + 1)]
    assert max(rates) == rates[steps // 4] and 0 < rates[-1] < max(rates)


def test_the_numbers_of_a_run_are_checked_through_its_macros(monkeypatch):
    for binding, message in {
        "TRAIN_STEPS=0": "total_steps must be a whole number of at least 1, got 0",
        "BATCH_SIZE=0": "Data.batch_size must be a whole number of at least 1, got 0",
        "DROPOUT_RATE=1": "DROPOUT_RATE must be a number of at least 0 and below 1, got 1",
        "DTYPE=float16": "DTYPE must be 'float32' or 'bfloat16', got 'float16': values",
        "SEED=-1": "seed must be a whole number from 0 to 4294967295, got -1",
        "REDUCTION=0.5": "Coda.reduction must be a number from 1 to 1000000, got 0.5",
        "TrainOptions.max_grad_norm=-1": "max_grad_norm must be a number above 0, got -1",
        "TASK_FEATURE_LENGTHS=64": "feature_lengths must be lengths such as .* got 64",
        "PRESET_CHANGES=64": "PRESET_CHANGES must be a dictionary such as .* got 64",
    }.items():
        gin.clear_config()
        with pytest.raises(ValueError, match=f"(?i){message}"):
            bindings_of_run("runs/finetune.gin", monkeypatch, binding)
    gin.clear_config()
    bindings_of_run("runs/finetune.gin", monkeypatch, "PEAK_LEARNING_RATE=-1")
    with pytest.raises(ValueError, match="peak_value must be a number above 0, got -1"):
        gin.get_configurable(schedules.warmup_cosine)()


def pretrained_methods(name):
    """What a run trains: pretraining all, with routing or without."""
    if "pretrain" not in name:
        return RECIPES["coda"]
    if "coda" not in name:
        return (Full(),)
    reductions = {"rendered_text": 8, "spoken": 4, "best_rq": 2}
    word = next((word for word in reductions if word in name), None)
    options = {"reduction": reductions.get(word, 3)}
    if word is None and name != "runs/pretrain_coda.gin":  # those that pack
        options["max_segments"] = 4
    return (Coda(**options), ParallelAdapter(), Full())


def test_the_objective_of_best_rq_knows_its_options_and_refuses_others(monkeypatch):
    name = "runs/pretrain_best_rq_coda.gin"
    _, arguments = bindings_of_run(name, monkeypatch, "NUM_CODES=11")
    made = arguments["objective"](arguments["model"].config)
    assert isinstance(made, BestRQ)
    assert (made.options["num_codes"], made.options["code_dim"]) == (11, 16)
    gin.clear_config()
    _, arguments = bindings_of_run(name, monkeypatch, "Z_LOSS=0.1")
    with pytest.raises(ValueError, match=r"objective 'best_rq' has no option \['z_loss'\]"):
        arguments["objective"](arguments["model"].config)


def test_the_objective_and_its_z_loss_are_macros_of_every_training_run(monkeypatch):
    _, arguments = bindings_of_run("runs/train.gin", monkeypatch, "Z_LOSS=0.5")
    config = arguments["model"].config
    assert arguments["objective"](config).options == model_for(config, z_loss=0.5).options
    gin.clear_config()
    _, arguments = bindings_of_run("runs/train.gin", monkeypatch, "OBJECTIVE=ctc")
    with pytest.raises(ValueError, match="objective 'ctc' is not for such a 't5'"):
        arguments["objective"](config)


@pytest.mark.parametrize("name", files("tasks"))
def test_tasks_are_registered_with_inputs_and_targets(name, tmp_path):
    from coda_jax.data import seqio_tasks

    lines = [json.dumps({"inputs": "a", "targets": "b", "label": label}) for label in "xyx"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    bindings = ["VOCABULARY=bytes", "OUTPUT=unused", f"TRAIN_FILE={tmp_path}/train.jsonl"]
    text = (FOLDER / name).read_text()
    bindings += ["DIRECTORY=unused"] * ("DIRECTORY = " in text)
    bindings += [OWN_TEXTS] * ("TEXTS = None" in text)
    bindings += [f"RECORDINGS={FOLDER}/*.gin"] * ("RECORDINGS = " in text)
    cli.configure(["runs/cache.gin", name], [], bindings)
    arguments = gin.get_bindings(load("cache"))
    from_data = name in ("tasks/jsonl.gin", "tasks/labels.gin")
    assert from_data or arguments["feature_lengths"].keys() == {"inputs", "targets"}
    if name == "tasks/labels.gin":
        with pytest.raises(ValueError, match="has labels, which seqio's tasks do not"):
            seqio_tasks.provider(arguments["task"])
        return
    features = seqio_tasks.provider(arguments["task"]).output_features
    assert features.keys() == {"inputs", "targets"}


def test_files_of_t5x_are_parsed(monkeypatch):
    """On top of a run's file, where they are not one; tests/t5x makes what they configure."""
    reason = "T5X is not installed: make test-t5x T5X_PATH=..."
    pytest.importorskip("t5x.models", reason=reason, exc_type=ImportError)
    monkeypatch.setitem(sys.modules, "__main__", T5X_SCRIPT)
    for name in files("t5x"):
        own_run = "include 't5x/configs/runs" in including(name)
        names = [name] if own_run else ["t5x/finetune.gin", name]
        given = {"PRESET": "w2v_bert_tiny", "VOCABULARY": "bytes", "NUM_DECODER_LAYERS": 2}
        given["DROPOUT_RATE"] = 0.1  # which the parts leave open
        paths = ("CHECKPOINT_PATH", "EVAL_OUTPUT_DIR", "INFER_OUTPUT_DIR")
        given |= REQUIRED | dict.fromkeys(paths, "unused")
        bindings = [f"{macro}={value}" for macro, value in given.items()]
        cli.configure([*names, "methods/coda.gin"], [str(FOLDER)], bindings)
        made = gin.get_configurable(loading.configured_methods)()
        assert made == RECIPES["coda"], name
        assert gin.get_configurable(loading.configured_preset)().family == "wav2vec2-bert"
