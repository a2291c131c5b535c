"""Conditional adapters (CoDA) for T5, Pix2Struct and w2v-BERT in JAX and Flax.

A dense pretrained checkpoint is frozen; each encoder layer gets a small adapter, which sees every
token, and a router, which sends only some tokens through the layer. Only those two and the norms
are trained, and the model answers several times faster than one with plain adapters:

    import jax
    import coda_jax

    config, params = coda_jax.load_hf("flan-t5-base")  # dense; any family, see FAMILIES
    config = config.replace(
        methods=(coda_jax.Coda(reduction=3.0), coda_jax.ParallelAdapter(bottleneck=64))
    )
    params = coda_jax.swap_in(config, params, jax.random.key(0))  # strict: lists wrong leaves
    model = coda_jax.model_for(config)          # .logits .loss .predict .generate .encode ...
    batch = coda_jax.text_batch(
        config, coda_jax.load_vocabulary("flan-t5-base"), [("an input", "its target")]
    )
    coda_jax.save_adapter("my_adapter", config, params)

Methods are frozen dataclasses, listed in METHODS: any of them alone, or several in
`config.methods`. `partition` splits parameters into what is trained and what is frozen, `merge`
folds into the base what can be folded. `Predictor` answers lists of inputs. The operator of the
router alone is `soft_topk`.

The command `coda` trains, evaluates, predicts, converts and exports from gin files: `coda --help`.
Each folder of the package says in its own docstring what it holds. Everything here is loaded when
it is first used.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "FAMILIES": "models",
    "METHODS": "methods",
    "OBJECTIVES": "objectives",
    "Decoding": "inference",
    "Generation": "objectives",
    "Predictor": "inference",
    "combine_adapters": "methods",
    "encoder_of": "checkpoints",
    "load_adapter": "checkpoints",
    "load_adapter_hub": "checkpoints",
    "load_hf": "checkpoints",
    "load_peft": "checkpoints",
    "load_t5x": "checkpoints",
    "load_vocabulary": "data.vocabularies",
    "merge": "methods",
    "model_for": "objectives",
    "partition": "methods",
    "preset": "models",
    "quantize": "checkpoints",
    "save_adapter": "checkpoints",
    "save_adapter_hub": "checkpoints",
    "save_hf": "checkpoints",
    "save_peft": "checkpoints",
    "save_t5x": "checkpoints",
    "soft_topk": "methods.soft_topk",
    "swap_in": "checkpoints",
    "text_batch": "data.text_batches",
}


def _tables() -> dict[str, type]:
    """The classes of the methods and of the families' configs, by their names."""
    methods = importlib.import_module("coda_jax.methods").METHODS.values()
    configs = importlib.import_module("coda_jax.models").CONFIGS
    return {method.__name__: method for method in methods} | configs


def __getattr__(name: str):
    if name == "__all__":
        return sorted([*_HOMES, *_tables()])
    if name in _HOMES:
        return getattr(importlib.import_module(f"coda_jax.{_HOMES[name]}"), name)
    # Python asks here for submodules too, before it imports them; they are in lower case.
    found = _tables() if name[:1].isupper() else {}
    if name not in found:
        raise AttributeError(f"module 'coda_jax' has no attribute {name!r}")
    return found[name]


def __dir__():
    return sorted({*globals(), *_HOMES, *_tables()})
