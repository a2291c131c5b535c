"""Checkpoints by their names on the Hugging Face Hub, from the cache of its own tools.

Nothing here uses the network: the error for what is not in the cache says how to get it.
"""

import os
from pathlib import Path
import re
import shlex

from coda_jax.files import decoded, read_json

SAFETENSORS, FLAX, TORCH = "model.safetensors", "flax_model.msgpack", "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, FLAX, TORCH)  # or shards of them
OTHERS = ("config.json", "generation_config.json", "*processor_config.json", "*token*",
          "spiece.model", "vocab.json", "merges.txt")  # fmt: skip
MAX_JSON_BYTES = 4 * 2**20  # of a config or an index, which have some kB
_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def cache() -> Path:
    """The folder that the Hub's tools download to."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(os.path.expanduser(given or os.path.join(home, "hub"))))


def snapshot(name: str | os.PathLike) -> Path | None:
    """The folder in the cache with the files of a model that were downloaded.

    Args:
        name: such as "google/flan-t5-base"; a path that exists, or looks like one, is no name.

    Returns:
        The folder, None where there is none; it need not have all files.
    """
    name = os.fspath(name)
    if not _may_be_name(name):
        return None
    model = cache() / f"models--{name.replace('/', '--')}"
    main = model / "refs" / "main"  # which says a commit
    commit = decoded(main.read_bytes(), main).strip() if main.is_file() else ""
    folder = model / "snapshots" / commit
    return folder if re.fullmatch(r"\w+", commit) and folder.is_dir() else None


def find(checkpoint: str | os.PathLike) -> Path:
    """The folder of a checkpoint.

    Args:
        checkpoint: the folder, which may be missing; or the name of a model in the cache.

    Raises:
        FileNotFoundError: it could be a name, but its config or weights are not in the cache; the
            command that downloads them is shown.
    """
    folder = snapshot(checkpoint)
    if folder and (folder / "config.json").is_file() and _has_weights(folder):
        return folder
    name = os.fspath(checkpoint)
    if not _may_be_name(name):
        return Path(name)
    first, *others = (f"{Path(file).stem}*{Path(file).suffix}*" for file in WEIGHTS)
    raise FileNotFoundError(
        f"there is no folder {name}, nor a complete model of this name in {cache()}. If the "
        f"Hugging Face Hub has it:\n  hf download {shlex.join((name, *OTHERS, first))}\n"
        f"If it has no safetensors, end with {' or '.join(map(shlex.quote, others))}."
    )


def index_of(file: str) -> str:
    """The file that says which tensor is in which shard of a file of weights."""
    return f"{file}.index.json"


def _may_be_name(name: str) -> bool:
    return not os.path.exists(name) and bool(_NAME.fullmatch(name))


def _has_weights(folder: Path) -> bool:
    """Whether there is a file of weights, or an index with all of its shards."""
    for file in WEIGHTS:
        index = folder / index_of(file)
        if (folder / file).is_file():
            return True
        shards = read_json(index, MAX_JSON_BYTES).get("weight_map") if index.is_file() else None
        if isinstance(shards, dict) and all((folder / str(x)).is_file() for x in shards.values()):
            return True
    return False
