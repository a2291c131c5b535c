"""coda_jax: Conditional Adapters (CoDA) for T5-family encoder-decoder models in JAX and Flax."""

import pathlib

from coda_jax.soft_topk import soft_topk

__all__ = ["soft_topk"]
__version__ = "0.1.0"

# `tasks` and `gin_configs` are folders of the source tree's root that are installed as
# `coda_jax.tasks` and `coda_jax.gin_configs`; from a source tree they are found beside the package.
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists() and (_root / "gin_configs").is_dir():
    __path__.append(str(_root))
