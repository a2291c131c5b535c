"""Answers over HTTP: what `coda serve` runs.

| file | holds |
|---|---|
| `answers` | a model's outputs for a few inputs, as texts, labels and numbers |
| `reading` | the body of a request to rows, and rows to the inputs of a model |
| `batcher` | a bounded queue, and the one thread that answers it in batches of similar lengths |
| `metrics` | what is counted and timed, for Prometheus |
| `app` | the routes, and what is answered to a request that is refused |
| `server` | from a listening socket to the last answer |

The event loop has the first thread, bodies and rows are read in a second one, and the model has a
third to itself.
"""
