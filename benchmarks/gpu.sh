#!/usr/bin/env bash
# Our speed on one GPU in bfloat16, beside torch on the same card: about 7 minutes on an H100.
#     bash benchmarks/gpu.sh [FOLDER for the JSON files]
# From the root of the repository. Needs jax with CUDA, flax, optax, orbax-checkpoint; torch and
# transformers for the first table; neither tensorflow nor seqio.
set -euo pipefail
folder=${1:-benchmarks/results}
export PYTHONPATH=.
python3 -m benchmarks.gpu --json="$folder/gpu.json"
python3 benchmarks/gpu_torch.py --json="$folder/gpu_torch.json" || echo "torch: not measured"
