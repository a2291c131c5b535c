"""Speed, cost and pictures.

| file | holds |
|---|---|
| `flops` | operations counted by hand |
| `timing` | timing in turns, operations and memory of compiled programs |
| `breakdown` | a profile of the encoder by parts of a layer |
| `tpu` | what a compiled program costs on a TPU, in cycles |
| `topology` | programs compiled for TPUs that are not there |
| `plots` | pictures of the routing |
| `comparison_table` | recipes side by side: the columns, and how numbers are written |
| `comparison_points` | their quality over their speed, and the Pareto front |
| `comparison_text` | the table as Markdown |
| `comparison_plots` | pictures of quality over speed and of learning curves |
| `comparison_svg` | quality over speed as an SVG with links |
| `comparison_page` | all of it in one HTML file |
| `labels` | labels of a picture, and where they and ticks stand |
| `learning_curve` | a picture of a run's metrics |
| `confusion` | a picture of which classes were taken for which |
| `detection` | a picture of scores of what is in and out of distribution |
"""
