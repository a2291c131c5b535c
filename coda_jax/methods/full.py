"""Full tuning: every leaf of the base is trained."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from coda_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains all leaves, alone or beside other methods (conditional pretraining).

    What comes out is a base of its own: on export the method is done and leaves nothing behind.
    """

    name: ClassVar[str] = "full"
    also_trains: ClassVar[tuple[str, ...]] = (r"",)
    on_quantized: ClassVar[bool] = False

    def finish(self, config: Any, params: Mapping[str, Any]) -> tuple[None, Mapping[str, Any]]:
        """Nothing of the method, and the parameters, which are the new base's."""
        del config
        return None, params
