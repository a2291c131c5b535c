"""seqio tasks, installed as `coda_jax.tasks`; importing a module registers its tasks."""

from coda_jax.optional import needs

with needs():  # Here, so that one sentence says it for all tasks.
    import seqio  # noqa: F401
