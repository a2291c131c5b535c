"""Methods as version 1 of adapter files and runs wrote them, when there were only these."""

from collections.abc import Mapping
from typing import Any

KINDS = {"coda": "coda", "adapter": "parallel_adapter"}  # their key: the method's name
TRAINED = {"adapters": (), "all": ({"name": "full"},)}


def as_methods(entries: Mapping[str, Any], trained: str = "adapters") -> list[Mapping[str, Any]]:
    """The methods as a config's JSON has them today.

    Args:
        entries: fields of the adapter and of the routing by their keys, None where there is none.
        trained: "adapters" or "all".

    Raises:
        ValueError: `trained` is another word.
    """
    if trained not in TRAINED:
        raise ValueError(f"trained={trained!r} is unknown; it must be one of {[*TRAINED]}")
    given = {name: entries.get(key) for key, name in KINDS.items()}
    found = [{"name": name, **fields} for name, fields in given.items() if fields is not None]
    return [*found, *TRAINED[trained]]
