"""seqio tasks, installed as `coda_jax.tasks`; importing a module registers its tasks."""
