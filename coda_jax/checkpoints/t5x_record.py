"""What a T5X checkpoint does not say: JSON files beside the checkpoints of a run.

`model.json` has the model's `config`, beside `format_version` and `package_version`, as an adapter
file's manifest has them, and where the checkpoints hold only what was trained `base`, the
fingerprints of the rest. `data.json` says of a training what its data are and at which step they
began. The folder may be in a bucket, as T5X's may (gs://...).
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import re
from typing import Any

from etils import epath

import coda_jax
from coda_jax import files
from coda_jax.checkpoints import config_json
from coda_jax.checkpoints.adapter import FORMAT_VERSION
from coda_jax.checkpoints.t5x import PREFIX
from coda_jax.models import ModelConfig

RECORD = "model.json"
DATA_RECORD = "data.json"


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """The data of a training.

    Attributes:
        first_step: T5X's step before the first batch was taken.
        processes: that shared each batch.
        data: what the batches are, as JSON.
    """

    first_step: int
    processes: int
    data: Mapping[str, Any]


def run_folder(checkpoint: str | os.PathLike) -> epath.Path:
    """The folder of the run that a checkpoint belongs to; that of a run itself."""
    path = epath.Path(checkpoint)
    return path.parent if re.fullmatch(rf"{PREFIX}_\d+", path.name) else path


def saved_steps(folder: epath.Path) -> list[int]:
    """The steps of a run's checkpoints, ascending; T5X goes on from the last."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(rf"{PREFIX}_(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def has_checkpoints(folder: epath.Path) -> bool:
    """Whether a run has saved anything yet, so that T5X goes on from there."""
    return bool(saved_steps(folder))


def read_record(folder: epath.Path) -> ModelConfig | None:
    """The config of a run's model; None where its folder does not say it.

    Raises:
        ValueError: the record is damaged, or of an unknown version.
    """
    record = _read(folder / RECORD)
    return None if record is None else config_json.from_json(record.get("config"), folder / RECORD)


def read_base(folder: epath.Path) -> dict[str, str] | None:
    """{path: SHA-256} of the leaves that a run's checkpoints lack, see `t5x_partial`; or None.

    Raises:
        ValueError: the record is damaged, or of an unknown version.
    """
    base = (_read(folder / RECORD) or {}).get("base")
    if base is not None and not isinstance(base, dict):
        raise ValueError(f"{folder / RECORD} has no fingerprints of its base: {base!r}")
    return base


def write_record(
    folder: epath.Path, config: ModelConfig, base: Mapping[str, str] | None = None
) -> None:
    """Writes what a run's model is beside its checkpoints; replaces another record whole.

    Args:
        folder: the run's.
        config: of its model.
        base: {path: SHA-256} of the leaves that its checkpoints lack; None where they have all.
    """
    record = {"config": config_json.to_json(config)}
    _write(folder / RECORD, record if base is None else {**record, "base": dict(base)})


def read_data_record(folder: epath.Path) -> DataRecord | None:
    """The data of a training; None where its folder does not say them.

    Raises:
        ValueError: the record is damaged, or of an unknown version.
    """
    record = _read(folder / DATA_RECORD)
    if record is None:
        return None
    try:
        return DataRecord(**{x.name: record[x.name] for x in dataclasses.fields(DataRecord)})
    except KeyError as error:
        raise ValueError(f"{folder / DATA_RECORD} has no {error}") from error


def write_data_record(folder: epath.Path, record: DataRecord) -> None:
    """Writes the data of a training beside its checkpoints; replaces other ones whole."""
    _write(folder / DATA_RECORD, dataclasses.asdict(record))


def _read(file: epath.Path) -> Mapping[str, Any] | None:
    if not file.exists():
        return None
    record = files.parse_json(file.read_bytes(), file)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version={record.get('format_version')!r}; this version reads "
            f"{FORMAT_VERSION}"
        )
    return record


def _write(file: epath.Path, record: Mapping[str, Any]) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        "package_version": coda_jax.__version__,
        **record,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / f".{file.name}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
