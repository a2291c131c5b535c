"""Training on one host.

| file | holds |
|---|---|
| `trainer` | the compiled step, the loop, evaluation by the loss |
| `schedules` | learning rates over a run |
| `optimizers` | those of optax that run files name, with their numbers checked |
| `run_directory` | what a run keeps on disk: checkpoints, logs, what it is; how it stops |
"""
