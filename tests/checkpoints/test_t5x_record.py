"""What a T5X run's folder says of its model, and the table of leaves that T5X shows."""

from etils import epath
from helpers import config, random_params
import jax
import numpy as np
import pytest
from t5x_formats import write_legacy, write_orbax

from coda_jax import files, trees
from coda_jax.checkpoints.t5x import table_of
from coda_jax.checkpoints.t5x_record import (
    RECORD,
    has_checkpoints,
    read_record,
    run_folder,
    write_record,
)
from coda_jax.methods import Coda, Lora

CODA = config().replace(methods=(Coda((1, 2.5), attention="k_to_all"), Lora(rank=2)))


def test_what_is_written_is_read(tmp_path):
    folder = run_folder(tmp_path / "run" / "checkpoint_1000")
    assert folder == epath.Path(tmp_path / "run") == run_folder(tmp_path / "run")
    assert read_record(folder) is None
    write_record(folder, config())
    write_record(folder, CODA)
    assert read_record(folder) == CODA
    assert [path.name for path in folder.iterdir()] == [RECORD]


def test_a_bucket_is_a_folder_too():
    assert str(run_folder("gs://bucket/run/checkpoint_5")) == "gs://bucket/run"
    assert str(run_folder("gs://bucket/run/")) == "gs://bucket/run"


def test_a_run_that_saved_nothing_has_no_checkpoints(tmp_path):
    assert not has_checkpoints(run_folder(tmp_path / "missing"))
    (tmp_path / "checkpoint_5.orbax-checkpoint-tmp-3").mkdir()
    assert not has_checkpoints(run_folder(tmp_path))
    (tmp_path / "checkpoint_5").mkdir()
    assert has_checkpoints(run_folder(tmp_path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format_version": 3}, "has format_version=3; this version reads 2"),
        ({"config": {"family": "t6"}}, "model.json.*'t6'"),
    ],
)
def test_a_record_of_something_else_is_refused(tmp_path, change, text):
    folder = run_folder(tmp_path)
    write_record(folder, CODA)
    files.write_json(tmp_path / RECORD, {**files.read_json(tmp_path / RECORD), **change})
    with pytest.raises(ValueError, match=text):
        read_record(folder)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"model\.json is not valid JSON"):
        read_record(folder)


def test_the_table_that_t5x_shows_has_the_shapes_that_it_says(tmp_path):
    """Of both formats, as T5X reads them."""
    from flax import serialization
    import orbax.checkpoint as ocp

    params = jax.tree.map(np.asarray, random_params(config()))
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    inline = "encoder/encoder_norm/scale"
    write_legacy(tmp_path, params, inline=(inline,))
    table = serialization.msgpack_restore((tmp_path / "checkpoint").read_bytes())
    assert table_of(table["optimizer"]["target"]) == shapes
    write_orbax(tmp_path, params, use_ocdbt=True)
    table, _ = ocp.PyTreeCheckpointHandler()._get_internal_metadata(tmp_path / "state")
    assert table_of(table["target"]) == dict.fromkeys(shapes)
