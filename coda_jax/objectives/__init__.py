"""What a model is trained for, one file an objective: loss, sums of scores, predictions.

| file | holds |
|---|---|
| `base` | `Model`, the base class of all, and the sums that they give |
| `seq2seq` | `Seq2Seq`: cross-entropy of the targets |
| `generation` | `Generation`: the options of outputs |
| `own_leaves` | `OwnLeaves`: a network in which each row has its own trained leaves |
| `decoding`, `beams` | greedy decoding, sampling and beam search over a cached decoder |
| `logits_processors` | what the options do to the logits |
| `prefix_tree` | several targets for one input in one row of the decoder |
| `ctc` | `CTC`: its loss, greedy decoding and prefix beam search |
| `encoding` | what is read of any encoder |
| `pooled` | `Classification`, `Regression` and `Embedding` of an encoder alone |
| `best_rq` | `BestRQ`: pretraining of speech encoders without transcripts |
"""

import inspect

from coda_jax.models import ModelConfig, family_of
from coda_jax.objectives.base import NOT_FINITE, Batch, Model, Sums
from coda_jax.objectives.best_rq import BestRQ, BestRQConfig
from coda_jax.objectives.ctc import CTC
from coda_jax.objectives.generation import Generation
from coda_jax.objectives.pooled import Classification, Embedding, Regression
from coda_jax.objectives.seq2seq import Seq2Seq

OBJECTIVES: dict[str, type[Model]] = {
    objective.name: objective
    for objective in (
        Seq2Seq,
        CTC,
        BestRQ,
        Classification,
        Regression,
        Embedding,
    )
}

__all__ = [
    "NOT_FINITE",
    "OBJECTIVES",
    "Batch",
    "BestRQConfig",
    "Generation",
    "Model",
    "Sums",
    "model_for",
    *(objective.__name__ for objective in OBJECTIVES.values()),
]


def model_for(config: ModelConfig, objective: str | None = None, **options) -> Model:
    """The model of a configuration.

    Args:
        config: sizes, options and methods; it decides the network.
        objective: a name of `OBJECTIVES`; None for the family's usual one.
        **options: of the objective, such as `z_loss` of "seq2seq"; None stands for its default.

    Raises:
        ValueError: the objective or an option is unknown, or not for such a config.
    """
    name = family_of(config).objectives(config)[0] if objective is None else objective
    if name not in [*OBJECTIVES]:
        raise ValueError(f"objective {name!r} is unknown; it must be one of {[*OBJECTIVES]}")
    given = {key: value for key, value in options.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(OBJECTIVES[name]).parameters.keys())
    if unknown:
        raise ValueError(f"objective {name!r} has no option {unknown}: {given}")
    return OBJECTIVES[name](config, **given)
