"""Imports of what not every installation has: where it is missing, the error says how to get it."""

from collections.abc import Iterator
import contextlib


@contextlib.contextmanager
def needs(extra: str | None = None) -> Iterator[None]:
    """Imports in this block need an extra, or, for None, what a light installation lacks.

        with needs("speech"):
            import soundfile

    Args:
        extra: of setup.py, such as "speech".

    Raises:
        ModuleNotFoundError: a module is missing; it and the command that installs it are named.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("coda_jax"):
            raise  # no package brings it: the import is wrong
        package = f"coda_jax[{extra}]" if extra else "coda_jax"
        raise ModuleNotFoundError(
            f"{error.name} is not installed; it comes with: pip install '{package}'",
            name=error.name,
            path=error.path,
        ) from error
