"""Training on one host.

| file | holds |
|---|---|
| `trainer` | the compiled step, the loop, evaluation by the loss |
| `schedules` | learning rates over a run |
| `run_directory` | what a run keeps on disk: checkpoints, logs, what it is; how it stops |
"""
