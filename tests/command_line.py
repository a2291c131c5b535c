"""What the tests of commands share: `coda` as a shell calls it."""

import gin

from coda_jax import cli


def flags(files=(), bindings=None):
    """The flags of gin files and {name: value}; values are written without quotes of their own."""
    return [
        *(f"--gin_file={file}" for file in files),
        *(f"--gin.{name}={value}" for name, value in (bindings or {}).items()),
    ]


def coda(command, files, bindings):
    """Runs a command, which must succeed, and leaves no configuration behind."""
    cli.run([command, *flags(files, bindings)])
    gin.clear_config()
