"""A T5X run that goes on takes the batches that it has not taken yet; without T5X."""

import functools
import json
import types

from helpers import ADAPTER
import jax
import pytest

from coda_jax.checkpoints.t5x_record import read_data_record, run_folder
from coda_jax.commands import t5x_data
from coda_jax.methods import Coda


def dataset(**changes):
    """What T5X's DatasetConfig has."""
    fields = {
        "mixture_or_task_name": "mnli",
        "task_feature_lengths": {"inputs": 64, "targets": 4},
        "split": "train",
        "batch_size": 8,
        "shuffle": True,
        "seed": 0,
        "use_cached": False,
        "pack": True,
    }
    return types.SimpleNamespace(**fields | changes)


CODA = (Coda(max_segments=8), ADAPTER)


def identity(methods=CODA, **changes):
    return t5x_data.identity(dataset(**changes), methods)


class Batches(list):
    """Batches that know what tf.data's do."""

    def skip(self, count):
        """The batches after so many."""
        return Batches(self[count:])


def get_dataset(config, shard_id, num_shards, feature_converter):
    """In the place of T5X's function."""
    assert (shard_id, num_shards, feature_converter) == (1, 2, "converter")
    return Batches(range(config.batch_size))


def batches(folder, data, **options):
    given = (dataset(), 1, 2, "converter")
    options |= {"get_dataset": get_dataset, "model_dir": str(folder), "data": data}
    return t5x_data.resumed(*given, **options)


def save(folder, *steps):
    for step in steps:
        (folder / f"checkpoint_{step}").mkdir()


@pytest.fixture(name="run")
def fixture_run(tmp_path):
    """The folder of a run that began at step 1000 and saved last at 1005."""
    t5x_data.record_data(tmp_path, identity(), 1000)
    save(tmp_path, 1000, 1005)
    return tmp_path


def test_what_a_run_has_taken_is_left_out_when_it_goes_on(run, caplog):
    assert batches(run, identity()) == [5, 6, 7]
    t5x_data.record_data(run, identity(), 1005)
    save(run, 1007)
    assert batches(run, identity()) == [7]
    assert not caplog.messages


def test_a_run_that_saved_nothing_begins_with_its_data(tmp_path):
    """Also where the folder speaks of another one, which died before it had saved."""
    assert batches(tmp_path / "missing", identity()) == [*range(8)]
    t5x_data.record_data(tmp_path, identity(), 1000)
    assert batches(tmp_path, identity(batch_size=16)) == [*range(8)]
    t5x_data.record_data(tmp_path, identity(batch_size=16), 2)
    save(tmp_path, 2, 4)
    assert batches(tmp_path, identity(batch_size=16)) == [*range(2, 8)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"mixture_or_task_name": types.SimpleNamespace(name="rte")},
            "task: there 'mnli', here 'r",
        ),
        ({"task_feature_lengths": {"inputs": 64, "targets": 8}}, "task_feature_lengths/targets: "),
        ({"batch_size": 16}, "batch_size: there 8, here 16"),
        ({"seed": None}, "seed: there 0, here None"),
        ({"pack": False}, "max_segments: there 8, here None\n  pack: there True, here False"),
        ({"methods": (ADAPTER,)}, "max_segments: there 8, here "),
    ],
)
def test_other_data_are_refused_unless_they_are_asked_for(run, change, text, caplog):
    with pytest.raises(
        ValueError, match=rf"other data:\n  {text}(.*\n)+.*CHANGE_DATA=True goes on"
    ):
        batches(run, identity(**change))
    assert batches(run, identity(**change), change_data=True) == [*range(8)]
    assert f"{run}: the data start from their beginning: they are others" in caplog.messages[0]
    t5x_data.record_data(run, identity(**change), 1005)
    save(run, 1006)
    if change.keys() != {"seed"}:
        assert batches(run, identity(**change)) == [*range(1, 8)]


def test_where_the_data_start_again_it_is_said_why(run, tmp_path, caplog):
    t5x_data.record_data(run, identity(seed=None), 1005)
    assert batches(run, identity(seed=None)) == [*range(8)]
    (run / "data.json").unlink()
    assert batches(run, identity()) == [*range(8)]
    said = "; ".join(caplog.messages)
    assert "in another order: RANDOM_SEED=None" in said and "is not known" in said


def test_other_processes_share_a_batch_in_another_way(run, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert batches(run, identity()) == [5, 6, 7]
    assert caplog.messages == [
        f"{run}: 1 processes shared a batch and now 4 do, so that it has other examples"
    ]


def test_a_record_that_cannot_be_of_this_run_is_refused(run):
    write = functools.partial(t5x_data.record_data, run)
    (run / "data.json").unlink()
    write(identity(), 1006)
    with pytest.raises(
        ValueError, match=r"began at step 1006, .* of step 1005: .*remove data\.json"
    ):
        batches(run, identity())
    (run / "data.json").write_text(json.dumps({"format_version": 2, "data": {}}))
    with pytest.raises(ValueError, match=r"data\.json has no 'first_step'"):
        read_data_record(run_folder(run))
