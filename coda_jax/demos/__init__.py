"""`make demo` and its kin: a bundled checkpoint adapted several ways, evaluated, timed, drawn."""

from coda_jax.commands import environment

environment.quiet("demo", verbose=False)  # before jax or TensorFlow is imported
