"""What is given has an effect, or is an error: macros, bindings and files of every command."""

import itertools
import re
import sys
import types

from absl import flags
import gin
import pytest

from coda_jax.commands import COMMANDS, configuration, manual, mistakes
from coda_jax.commands.check import check
from coda_jax.commands.configuration import check_flags_of_t5x, check_rate_of_t5x, configure
from coda_jax.commands.gin_files import UsageError, package_names, read
from coda_jax.commands.gin_macros import _readers
from coda_jax.training.trainer import TrainOptions

MODEL = "INITIAL_CHECKPOINT_PATH=unused"
TRAIN = ["runs/finetune.gin", "methods/coda.gin", "tasks/labels.gin"]
CHECK = ["runs/check.gin", "methods/coda.gin"]
GIVEN = {
    "train": (["runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"], [MODEL, "MODEL_DIR=x"]),
    "evaluate": (["runs/evaluate.gin", "tasks/jsonl.gin"], [MODEL]),
    "ood": (["runs/ood.gin", "tasks/jsonl.gin"], [MODEL, "OOD=x.jsonl"]),
    "predict": (["runs/predict.gin"], [MODEL, "INPUT=x"]),
    "serve": (["runs/serve.gin"], [MODEL]),
    "check": (CHECK, [MODEL]),
    "convert": (["runs/convert.gin"], ["INPUT=x", "OUTPUT=y", "LAYOUT=hf"]),
    "export": (["runs/export.gin"], [MODEL, "OUTPUT=y"]),
    "prune": (["runs/prune.gin"], ["INPUT=x", "OUTPUT=y"]),
    "compare": (["runs/compare.gin"], ["MODEL_DIR=x"]),
    "cache": (["runs/cache.gin", "tasks/jsonl.gin"], ["OUTPUT=y", "VOCABULARY=bytes"]),
}


@pytest.mark.parametrize("command", GIVEN)
def test_every_command_is_configured_and_knows_what_has_no_effect(command):
    files, bindings = GIVEN[command]
    configure(files, [], bindings, command)
    with pytest.raises(UsageError, match=r"--gin\.NO_SUCH=3: nothing reads NO_SUCH"):
        configure(files, [], [*bindings, "NO_SUCH=3"], command)
    for macro in manual.macros(files[0]):
        with pytest.raises(UsageError, match=f"nothing reads {macro}Q"):
            configure(files, [], [*bindings, f"{macro}Q=3"], command)


@pytest.mark.parametrize(
    ("command", "binding", "message"),
    [
        ("train", "TRAIN_STEP=50", "nothing reads TRAIN_STEP; did you mean TRAIN_STEPS = 1000?"),
        ("evaluate", "REDUCTON=5", "nothing reads REDUCTON; did you mean REDUCTION = None?"),
        ("train", "BATCHSIZE=5", "nothing reads BATCHSIZE; did you mean BATCH_SIZE = 32?"),
        ("train", "batch_size=5", "did you mean BATCH_SIZE"),
        ("train", "RANK=4", "nothing reads RANK; it is of methods/lora.gin"),
        ("predict", "TRAIN_FILE=x", "it is of tasks/jsonl.gin and tasks/labels.gin"),
        ("predict", "Decoding.num_beam=4", "no parameter 'num_beam'; did you mean num_beams"),
        ("predict", "Decodin.num_beams=4", "nothing called 'Decodin' to configure; did you mean"),
        ("predict", "BATCH_SIZE.x=4", "BATCH_SIZE is a macro: bind all of it"),
        ("check", "Lora.rank=3", "--gin.Lora.rank=3 has no effect: nothing that this run uses"),
        (
            "train",
            "Data.seed=3",
            "it goes behind eval/Data.seed and train/Data.seed",
        ),
        ("train", "test/Data.seed=3", "test/Data.seed=3 has no effect"),
        ("check", "A=%B", "nothing reads A"),
        ("check", "READ_VALUES=%B", "reads %B, which has no value"),
        ("check", "READ_VALUES=@nothing()", "--gin.READ_VALUES=@nothing(): "),
    ],
)
def test_what_would_have_no_effect_is_told_with_what_may_be_meant(command, binding, message):
    files, bindings = GIVEN[command]
    with pytest.raises(UsageError, match=re.escape(message)):
        configure(files, [], [*bindings, binding], command)


def test_a_macro_of_a_method_that_is_left_out_has_no_effect():
    configure(CHECK, [], [MODEL, "REDUCTION=5", "Coda.epsilon=2"], "check")
    for binding in ("REDUCTION=5", "Coda.epsilon=2", "ParallelAdapter.bottleneck=3"):
        with pytest.raises(UsageError, match="has no effect"):
            configure(CHECK, [], [MODEL, binding, "METHODS=('full',)"], "check")


def test_bindings_count_through_scopes_macros_and_functions():
    for binding in ("train/Data.pack=True", "Data.pack=True", "adamw.b1=0.8", "SEED=3"):
        configure(TRAIN, [], [MODEL, "MODEL_DIR=x", binding], "train")
    lora = ["runs/check.gin"], [], [MODEL, "METHODS=('lora',)", "Lora.rank=3"]
    configure(*lora, "check")


def test_a_file_of_ones_own_is_held_to_the_same(tmp_path):
    own = tmp_path / "own.gin"
    head = "from __gin__ import dynamic_registration\nfrom coda_jax import methods\n"
    own.write_text(head + "HERE = 7\nREDUCTION = %HERE\n")
    configure([*CHECK, str(own)], [], [MODEL], "check")
    assert gin.query_parameter("methods.Coda.reduction").scopes == ["REDUCTION"]
    for line, message in (
        ("THERE = 3", "own.gin:5: nothing reads THERE"),
        ("methods.Lora.rank = 3", "own.gin has no effect: nothing that this run uses reads Lora"),
        ("methods.Lora.rnak = 3", "Lora has no parameter 'rnak'; did you mean rank"),
        ("method.Lora.rank = 3", "'method' was not provided by an import statement"),
        ("methods.Lroa.rank = 3", "has no attribute Lroa"),
    ):
        own.write_text(head + f"HERE = 7\nREDUCTION = %HERE\n{line}\n")
        with pytest.raises(UsageError, match=re.escape(message)):
            configure([*CHECK, str(own)], [], [MODEL], "check")
    own.write_text("import no_such_module\n")
    with pytest.raises(UsageError, match="No module named 'no_such_module': what a gin"):
        configure([*CHECK, str(own)], [], [MODEL], "check")


def test_an_error_in_a_module_of_ones_own_is_not_taken_for_a_mistake_in_a_file(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("raise ValueError('from within')\n")
    (tmp_path / "own.gin").write_text("import broken_module\n")
    with pytest.raises(ValueError, match="from within") as raised:
        configure([*CHECK, str(tmp_path / "own.gin")], [], [MODEL], "check")
    assert not isinstance(raised.value, UsageError)


def test_what_code_configures_by_a_decorator_is_not_followed(tmp_path, monkeypatch):
    module = types.ModuleType("configured_here")

    @gin.configurable("configured_here_rate")
    def rate(value=1):
        return value

    module.rate = rate
    monkeypatch.setitem(sys.modules, "configured_here", module)
    own = tmp_path / "own.gin"
    own.write_text("import configured_here\nconfigured_here_rate.value = %RATE\nRATE = 3\n")
    configure([*CHECK, str(own)], [], [MODEL], "check")
    assert module.rate() == 3


@pytest.mark.parametrize(
    ("command", "files", "bindings", "message"),
    [
        ("train", [], [], "a file of runs/ is missing; for example: coda train "),
        ("train", ["methods/coda.gin"], [], "a file of runs/ is missing"),
        ("train", ["runs/predict.gin"], [], "runs/predict.gin is for `coda predict`; for example"),
        ("train", ["t5x/finetune.gin"], [], "t5x/"),
        ("train", ["runs/finetune.gin"], [], "a recipe, which says what is trained, is missing"),
        ("train", TRAIN[:2], [MODEL, "MODEL_DIR=x"], "MIXTURE_OR_TASK_NAME or CACHE must be given"),
        ("train", TRAIN, [MODEL], "MODEL_DIR must be given: --gin.MODEL_DIR=...; for example"),
        ("evaluate", ["runs/evaluate.gin", "methods/coda.gin"], [], "takes no recipe: leave out"),
        ("predict", ["runs/predict.gin", "tasks/jsonl.gin"], [], "takes no task: leave out"),
    ],
)
def test_what_is_missing_or_out_of_place_is_told(command, files, bindings, message):
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        configure(files, [], bindings, command)
    assert len(str(told.value).splitlines()) == 1


def values(*names):
    """Of macros."""
    return [gin.query_parameter(f"{name}/macro.value") for name in names]


def test_epochs_of_ones_own_take_the_place_of_the_packages_steps(tmp_path):
    given = [MODEL, "MODEL_DIR=x"]
    configure(TRAIN, [], [*given, "EPOCHS=3"], "train")
    assert values("TRAIN_STEPS", "EPOCHS") == [None, 3]
    own = tmp_path / "own.gin"
    own.write_text("TRAIN_STEPS = 7\n")
    configure([*TRAIN, str(own)], [], given, "train")
    assert values("TRAIN_STEPS", "EPOCHS") == [7, None]
    configure([*TRAIN, str(own)], [], [*given, "EPOCHS=3", "TRAIN_STEPS=None"], "train")
    assert values("TRAIN_STEPS", "EPOCHS") == [None, 3]
    named = rf"TRAIN_STEPS or EPOCHS, one of the two: {re.escape(str(own))}:1 and --gin.EPOCHS=3"
    with pytest.raises(UsageError, match=named):
        configure([*TRAIN, str(own)], [], [*given, "EPOCHS=3"], "train")


@pytest.mark.parametrize("files", list(itertools.permutations(TRAIN)))
def test_files_in_any_order_configure_the_same(files):
    configure(TRAIN, [], [MODEL, "MODEL_DIR=x"], "train")
    expected = gin.config_str()
    configure(files, [], [MODEL, "MODEL_DIR=x"], "train")
    assert gin.config_str() == expected
    assert gin.query_parameter("TRAIN_STEPS/macro.value") == 1000


@pytest.mark.parametrize("files", list(itertools.permutations([*CHECK, "{own}"])))
def test_what_is_written_in_ones_own_file_counts_wherever_it_stands(files, tmp_path):
    (tmp_path / "own.gin").write_text("REDUCTION = 7\n")
    files = [file.format(own=tmp_path / "own.gin") for file in files]
    configure(files, [], [MODEL], "check")
    assert gin.query_parameter("REDUCTION/macro.value") == 7
    assert gin.query_parameter("METHODS/macro.value") == ("coda", "parallel_adapter")


def test_no_macro_of_the_package_is_read_nowhere():
    """By its own file, or by one of those that it is given beside or that include it."""
    names = [name for name in package_names() if not name.startswith("t5x/")]
    members = {name: list(read(name).members()) for name in names}
    bound = {
        name: {b.name: b for f in files for b in f.bindings} for name, files in members.items()
    }
    together = [
        {**bound[run], **bound[name]} for run in names if run.startswith("runs/") for name in names
    ]
    read_by = {macro for bindings in together for macro in _readers(bindings)}
    unread = {
        f"{name}: {binding.macro}"
        for name in names
        for binding in bound[name].values()
        if binding.macro and binding.macro not in read_by
    }
    assert not unread


@pytest.fixture
def t5x_flags(monkeypatch):
    """Sets T5X's flags as its programs have them; `check` stands for T5X's own function."""
    reached = configuration.reachable
    monkeypatch.setattr(configuration, "reachable", lambda: reached(check))

    def given(files, bindings, search_paths=()):
        values = flags.FlagValues()
        flags.DEFINE_multi_string("gin_file", list(files), "", flag_values=values)
        flags.DEFINE_multi_string("gin_bindings", list(bindings), "", flag_values=values)
        flags.DEFINE_list("gin_search_paths", list(search_paths), "", flag_values=values)
        values.mark_as_parsed()
        monkeypatch.setattr(flags, "FLAGS", values)

    return given


def test_macros_of_t5xs_command_line_are_read_by_something(t5x_flags, tmp_path):
    (tmp_path / "own.gin").write_text("include 'preset.gin'\nMODL = 3\n")
    configure(CHECK, [], [MODEL, "REDUCTION=4"])
    t5x_flags(CHECK, ["REDUCTION = 4", "Coda.epsilon = 1.0"])
    check_flags_of_t5x()
    t5x_flags([*CHECK, "gs://bucket/other.gin"], ["REDUCTON = 4"])
    with pytest.raises(UsageError, match="nothing reads REDUCTON; did you mean REDUCTION"):
        check_flags_of_t5x()
    t5x_flags([*CHECK, str(tmp_path / "own.gin")], [])
    with pytest.raises(UsageError, match=r"own\.gin:2: nothing reads MODL"):
        check_flags_of_t5x()


def test_a_file_before_t5xs_run_that_it_would_overwrite_is_refused(t5x_flags, tmp_path):
    runs = tmp_path / "t5x" / "configs" / "runs"
    runs.mkdir(parents=True)
    (runs / "own.gin").write_text("TASK_FEATURE_LENGTHS = None\n")
    configure(CHECK, [], [MODEL])
    run = str(runs / "own.gin")
    t5x_flags(["tasks/mnli.gin", run], [])
    with pytest.raises(UsageError, match=r"overwrites TASK_FEATURE_LENGTHS of tasks/mnli\.gin"):
        check_flags_of_t5x()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (["methods/coda.gin", "methods/lora.gin"], "two recipes in one command"),
        (["tasks/mnli.gin", "tasks/rte.gin"], "two tasks in one command"),
        (
            ["OWN", "methods/coda_k_to_all.gin"],
            r"in it methods/coda\.gin\) overwrites REDUCTION",
        ),
        (
            ["OWN", "methods/coda.gin"],
            r"^methods/coda\.gin overwrites REDUCTION of .*give it",
        ),
        (["tasks/mnli.gin", "OWN", "preset.gin"], r"preset\.gin overwrites PRESET of .*own\.gin"),
    ],
)
def test_an_order_in_which_t5x_would_lose_what_is_given_is_refused(
    files, text, t5x_flags, tmp_path
):
    own = tmp_path / "own.gin"
    own.write_text("REDUCTION = 5\nPRESET = 't5_1_1_base'\n")
    configure(CHECK, [], [MODEL])
    t5x_flags([str(own) if name == "OWN" else name for name in files], [])
    with pytest.raises(UsageError, match=text):
        check_flags_of_t5x()


def test_the_order_that_counts_is_no_mistake_under_t5x(t5x_flags, tmp_path):
    own = tmp_path / "own.gin"
    own.write_text("include 'methods/coda.gin'\nREDUCTION = 5\n")
    configure(CHECK, [], [MODEL])
    for files in (["preset.gin", "methods/coda.gin", "tasks/mnli.gin"], ["preset.gin", str(own)]):
        t5x_flags(files, ["REDUCTION = 5"])
        check_flags_of_t5x()
    own.write_text("REDUCTION = 5\nREDUCTION = 3\n")
    t5x_flags([str(own)], [])
    with pytest.raises(UsageError, match=r"REDUCTION is given twice: .*:1 and .*:2"):
        check_flags_of_t5x()


def test_a_binding_that_t5x_does_not_use_is_refused(t5x_flags, tmp_path):
    own = tmp_path / "own.gin"
    own.write_text(
        "from __gin__ import dynamic_registration\nfrom coda_jax import inference\n"
        "inference.Decoding.num_beams = 4\n"
    )
    configure([*CHECK, str(own)], [], [MODEL])
    t5x_flags([*CHECK, str(own)], [])
    with pytest.raises(UsageError, match=r"own\.gin:3 has no effect: nothing .* reads Decoding"):
        check_flags_of_t5x()


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("OPTIMIZER = @optax.adafactor()\noptax.adafactor.learning_rate = %LEARNING_RATE", True),
        ("OPTIMIZER = @optax.adafactor()\noptax.adafactor.learning_rate = 0.1", False),
        (
            "OPTIMIZER = @optax.apply_if_finite()\noptax.apply_if_finite.inner = @x/optax.adamw()\n"
            "x/optax.adamw.learning_rate = @schedules.checked()\n"
            "schedules.checked.learning_rate = %LEARNING_RATE",
            True,
        ),
        ("OPTIMIZER = @optax.adamw()\nother/optax.adamw.learning_rate = %LEARNING_RATE", False),
        ("OTHER = 3", True),  # there is no optimizer
    ],
)
def test_the_rate_that_t5x_logs_is_that_of_the_optimizer(text, reads):
    head = "from __gin__ import dynamic_registration\nfrom coda_jax.training import schedules\n"
    gin.clear_config()
    gin.parse_config(f"{head}import optax\nLEARNING_RATE = 0.1\n{text}")
    try:
        if reads:
            check_rate_of_t5x()
        else:
            with pytest.raises(UsageError, match="bind the optimizer's learning_rate = %LEARNING"):
                check_rate_of_t5x()
    finally:
        gin.clear_config()


def test_an_error_names_the_macro_that_gave_the_value():
    configure(TRAIN, [], [MODEL, "MODEL_DIR=x", "TRAIN_STEPS=-5"], "train")
    with pytest.raises(ValueError) as error:
        TrainOptions(total_steps=-5)
    said = mistakes.told(error.value)
    assert said.startswith("TrainOptions.total_steps (TRAIN_STEPS) must be a whole number ")
    assert mistakes.told(ValueError("Data.task is None")) == "Data.task is None"  # of two macros


def test_every_command_that_gin_files_configure_is_tried_here():
    assert {name for name, row in COMMANDS.items() if not row.has_flags} == set(GIVEN)


@pytest.mark.parametrize(
    "given", [["REDUCTION=%REDUCTION"], ["METHODS=%METHODS"], ["DTYPE=%SEED", "SEED=(%DTYPE,)"]]
)
def test_a_macro_that_is_made_of_itself_is_refused(given):
    with pytest.raises(UsageError, match="is made of itself"):
        configure(TRAIN, [], [MODEL, "MODEL_DIR=x", *given], "train")
