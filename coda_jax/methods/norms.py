"""Norms only: the layer norms of the base are trained, and nothing else."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from coda_jax.methods.base import NORMS, Method


@dataclasses.dataclass(frozen=True)
class Norms(Method):
    """Trains scale and bias of every norm. It creates no leaf and costs no operation.

    Reference: Zhao et al. 2023, Tuning LayerNorm in Attention, arXiv 2312.11420.
    """

    name: ClassVar[str] = "norms"
    also_trains: ClassVar[tuple[str, ...]] = NORMS

    def merge(self, config: Any, params: Mapping[str, Any]) -> tuple[None, Mapping[str, Any]]:
        """Nothing of the method, and the parameters, which have the norms already."""
        del config
        return None, params
