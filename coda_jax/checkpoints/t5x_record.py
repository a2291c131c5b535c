"""What a T5X checkpoint does not say, its model's config: a JSON beside the checkpoints of a run.

`model.json` has `format_version`, `package_version` and `config`, as an adapter file's manifest has
them, and where the checkpoints hold only what was trained `base`, the fingerprints of the rest. Its
folder may be in a bucket, as T5X's may (gs://...).
"""

from collections.abc import Mapping
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
    record = _read(folder)
    return None if record is None else config_json.from_json(record.get("config"), folder / RECORD)


def read_base(folder: epath.Path) -> dict[str, str] | None:
    """{path: SHA-256} of the leaves that a run's checkpoints lack, see `t5x_partial`; or None.

    Raises:
        ValueError: the record is damaged, or of an unknown version.
    """
    base = (_read(folder) or {}).get("base")
    if base is not None and not isinstance(base, dict):
        raise ValueError(f"{folder / RECORD} has no fingerprints of its base: {base!r}")
    return base


def _read(folder: epath.Path) -> dict[str, Any] | None:
    file = folder / RECORD
    if not file.exists():
        return None
    record = files.parse_json(file.read_bytes(), file)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version={record.get('format_version')!r}; this version reads "
            f"{FORMAT_VERSION}"
        )
    return record


def write_record(
    folder: epath.Path, config: ModelConfig, base: Mapping[str, str] | None = None
) -> None:
    """Writes what a run's model is beside its checkpoints; replaces another record whole.

    Args:
        folder: the run's.
        config: of its model.
        base: {path: SHA-256} of the leaves that its checkpoints lack; None where they have all.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "package_version": coda_jax.__version__,
        "config": config_json.to_json(config),
        **({} if base is None else {"base": dict(base)}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)
