"""Does a model know which inputs are none of its task? Scores of inputs, and how well they tell.

A score is higher for what is in distribution, whichever it is.

| file | holds |
|---|---|
| `confidence` | scores of the labels' logits: maximum softmax probability, energy |
| `distances` | scores of features: Mahalanobis, relative Mahalanobis, cosine, nearest neighbours |
| `routing` | scores of the router's weights: their entropy, the candidates that it rejects |
| `metrics` | AUROC, FPR at 95 % TPR, AUPR, their intervals; a threshold by its false alarms |
| `outputs` | what a model makes of inputs: the logits of the labels, and features |
| `detector` | all scores with their thresholds, as a file for `coda predict` |
| `known` | the labels of a task, and those that are held out |
"""
