"""Speed, cost and pictures.

| file | holds |
|---|---|
| `flops` | operations counted by hand |
| `timing` | timing in turns, operations and memory of compiled programs |
| `breakdown` | a profile of the encoder by parts of a layer |
| `tpu` | what a compiled program costs on a TPU, in cycles |
| `topology` | programs compiled for TPUs that are not there |
| `plots` | pictures of the routing |
"""
