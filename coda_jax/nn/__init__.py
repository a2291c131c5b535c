"""Blocks of networks, without family or method.

| file | holds |
|---|---|
| `tokens` | what a layer knows of its tokens; a selection of some, its gather and scatter |
| `layers` | projections, norms, embeddings, feed-forward blocks |
| `bottleneck` | that of adapters |
| `dot_product_attention` | softmax(q k^T + bias) v, as each platform does it best |
| `attention_kernel` | the same for GPUs, without an array of all queries and keys |
| `long_attention` | the same for long inputs on all platforms, and its gradient |
| `attention` | its projections, the decoder's cache |
| `position_bias` | T5's relative position bias |
| `visibility` | which keys a query may see |
| `relative_keys` | attention with a learned vector for each distance |
| `sums` | sums whose order does not depend on the shape |
| `quantized` | matrices as int8, with a scale for each output |
| `one_row` | a product of one row, for TPUs |
| `one_hot` | gather, scatter and counts as products, for TPUs |
| `convolution` | a Conformer's convolution |
| `remat` | layers that compute again what their gradient needs |
| `cuda` | functions that have a kernel for CUDA GPUs |
| `processors` | whether a CPU multiplies bfloat16 |
"""
