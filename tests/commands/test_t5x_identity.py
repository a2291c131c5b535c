"""A run of T5X is the one that its folder holds, or it is said; without T5X."""

import gin
from helpers import ADAPTER, config
import pytest

from coda_jax import cli
from coda_jax.checkpoints.t5x_record import run_folder, write_record
from coda_jax.commands.t5x_identity import check_restored, check_resumed, recorded
from coda_jax.methods import Coda, Full, Lora, ParallelAdapter

CODA = config().replace(methods=(Coda(3), ADAPTER))
OTHERS = {  # what is asked for: what is said of it, there and here
    "reduction": ((Coda(5), ADAPTER), "methods/coda/reduction: there 3, here 5"),
    "attention": (
        (Coda(3, attention="k_to_all"), ADAPTER),
        "methods/coda/attention: there 'k_to_k', here 'k_to_all'",
    ),
    "routing": (
        (Coda(3, routing="sigmoid"), ADAPTER),
        "methods/coda/routing: there 'soft_topk', here 'sigmoid'",
    ),
    "method": ((ADAPTER,), r"methods/coda: there \{.*, here None"),
    "further": ((Coda(3), ADAPTER, Lora()), "methods/lora: there None, here "),
}
GONE_ON = "it goes on from a checkpoint of this one"


@pytest.fixture(name="run")
def fixture_run(tmp_path):
    """The folder of a run at r = 3, and of its checkpoint."""
    write_record(run_folder(tmp_path), CODA)
    return tmp_path, tmp_path / "checkpoint_10"


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_goes_on_as_it_began(run, name):
    adaptation, text = OTHERS[name]
    check_resumed(run[0], CODA)
    with pytest.raises(ValueError, match=rf"with other settings:\n  {text}(.*\n)*.*{GONE_ON}"):
        check_resumed(run[0], CODA.replace(methods=adaptation))


def test_what_changes_no_result_may_be_another_one(run):
    same = CODA.replace(dtype="bfloat16", dropout_rate=0.5)
    same = same.replace(methods=(Coda(3, max_segments=40), ADAPTER))
    check_resumed(run[0], same)
    check_restored(run[1], same, "evaluated")


def test_what_is_trained_is_part_of_a_run_but_not_of_its_answers(run):
    full = CODA.replace(methods=(*CODA.methods, Full()))
    with pytest.raises(ValueError, match="methods/full: there None, here "):
        check_resumed(run[0], full)
    check_restored(run[1], full, "trained on")


def test_sizes_that_no_shape_tells_are_compared(run):
    other = CODA.replace(num_heads=2 * CODA.num_heads, head_dim=CODA.head_dim // 2)
    for check in (lambda: check_resumed(run[0], other), lambda: check_restored(run[1], other, "x")):
        with pytest.raises(ValueError, match=r"num_heads: there .*, here "):
            check()


def test_another_reduction_is_said_where_a_model_answers(run, caplog):
    check_restored(run[1], CODA, "evaluated")
    assert not caplog.messages
    check_restored(run[1], CODA.replace(methods=(Coda(5), ADAPTER)), "evaluated")
    assert caplog.messages == [f"{run[1]}: trained at r = 3, evaluated at r = 5"]


@pytest.mark.parametrize("name", ["attention", "routing", "method", "further"])
def test_another_method_is_refused_unless_it_is_asked_for(run, name, caplog):
    adaptation, text = OTHERS[name]
    asked = CODA.replace(methods=adaptation)
    with pytest.raises(ValueError, match=rf"other settings:\n  {text}.*\n.*CHANGE_METHODS=True"):
        check_restored(run[1], asked, "evaluated")
    check_restored(run[1], asked, "evaluated", change=True)
    (said,) = caplog.messages
    assert "is evaluated with other settings" in said


def gin_of_a_training(*bindings):
    """The configuration that T5X writes into the folder of a run."""
    cli.configure(["runs/check.gin", "methods/coda_k_to_all.gin"], [], bindings)
    text = gin.config_str()
    gin.clear_config()
    return f"{text}\nTRAIN_STEPS = \\\n    10\n"


def test_an_older_run_says_its_methods_in_its_gin_configuration(tmp_path, caplog):
    text = gin_of_a_training("REDUCTION=(2, 4.5)", "ParallelAdapter.bottleneck=4")
    (tmp_path / "config.gin").write_text(text)
    methods = (Coda((2, 4.5), attention="k_to_all"), ParallelAdapter(4))
    asked = CODA.replace(methods=methods)
    assert recorded(tmp_path, CODA) == asked
    check_resumed(tmp_path, asked)
    assert not caplog.messages
    with pytest.raises(ValueError, match="attention: there 'k_to_all', here 'k_to_k'"):
        check_resumed(tmp_path, asked.replace(methods=(Coda((2, 4.5)), ParallelAdapter(4))))


@pytest.mark.parametrize("text", [None, "CHECKPOINT_PATH = 'x'\nMETHODS = ('coda',)\n"])
def test_where_nobody_says_it_it_is_said_that_nobody_does(tmp_path, text, caplog):
    """The gin configuration may be that of an evaluation, in the same folder."""
    if text:
        (tmp_path / "config.gin").write_text(text)
    check_resumed(tmp_path, CODA)
    check_restored(tmp_path / "checkpoint_3", CODA, "evaluated")
    assert ["not known" in message for message in caplog.messages] == [True, True]
