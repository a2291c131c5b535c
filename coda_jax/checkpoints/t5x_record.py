"""What a T5X checkpoint does not say, its model's config: a JSON beside the checkpoints of a run.

`model.json` has `format_version`, `package_version` and `config`, as an adapter file's manifest has
them. Its folder may be in a bucket, as T5X's may (gs://...).
"""

import json
import os
import re

from etils import epath

import coda_jax
from coda_jax import files
from coda_jax.checkpoints import config_json
from coda_jax.checkpoints.adapter import FORMAT_VERSION
from coda_jax.checkpoints.t5x import PREFIX
from coda_jax.models import ModelConfig

RECORD = "model.json"


def run_folder(checkpoint: str | os.PathLike) -> epath.Path:
    """The folder of the run that a checkpoint belongs to; that of a run itself."""
    path = epath.Path(checkpoint)
    return path.parent if re.fullmatch(rf"{PREFIX}_\d+", path.name) else path


def has_checkpoints(folder: epath.Path) -> bool:
    """Whether a run has saved anything yet, so that T5X goes on from there."""
    if not folder.is_dir():
        return False
    return any(re.fullmatch(rf"{PREFIX}_\d+", path.name) for path in folder.iterdir())


def read_record(folder: epath.Path) -> ModelConfig | None:
    """The config of a run's model; None where its folder does not say it.

    Raises:
        ValueError: the record is damaged, or of an unknown version.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    record = files.parse_json(file.read_bytes(), file)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version={record.get('format_version')!r}; this version reads "
            f"{FORMAT_VERSION}"
        )
    return config_json.from_json(record.get("config"), file)


def write_record(folder: epath.Path, config: ModelConfig) -> None:
    """Writes the config of a run's model beside its checkpoints; replaces another one whole."""
    record = {
        "format_version": FORMAT_VERSION,
        "package_version": coda_jax.__version__,
        "config": config_json.to_json(config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)
