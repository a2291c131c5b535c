"""Training, on one host or several.

| file | holds |
|---|---|
| `trainer` | the loop, evaluation by the loss |
| `options` | what a run is asked for: how long, how often |
| `steps` | the compiled step: what it changes, its gradient, its update |
| `distillation` | a teacher that a step follows |
| `routing_schedule` | one r of a list for each step, an annealed epsilon |
| `progress` | the progress bar, and the check that losses are finite |
| `metrics_file` | `metrics.csv`, exact also where a run was cut off |
| `best` | the best evaluation, and when a run ends early |
| `schedules` | learning rates over a run |
| `optimizers` | those of optax that run files name, with their numbers checked |
| `partial_optimizer` | T5X's optimizers, for what is trained alone |
| `run_identity` | what decides a run's result, and how another run differs |
| `run_checkpoints` | checkpoints: whole, checked, finite |
| `preemption` | how T5X's trainer is asked to stop |
| `run_directory` | who may write in a run's folder, its logs; how a run is asked to stop |
"""
