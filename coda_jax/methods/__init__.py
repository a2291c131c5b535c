"""Methods of adaptation, one file each. Start reading at `base`, then `coda`.

`METHODS` holds them all by name; its order is that in which they wrap a layer, the innermost
first, and in which a config keeps them. A new method is a file, and an import and an entry here.

| file | holds |
|---|---|
| `base` | the base class `Method`, and what follows from methods: what is trained, `merge` |
| `coda` | `Coda`: the router sends some tokens through the frozen layer |
| `cross_attention` | which tokens of the encoding a decoder attends to |
| `selection` | which tokens a row's scores pick, and their weights |
| `routing_kernel` | the same for GPUs, in one program |
| `soft_topk` | the differentiable top-k of the router: two solvers, one gradient |
| `kth_largest` | the k-th largest score, without sorting |
| `parallel_adapter` | `ParallelAdapter`: a bottleneck beside each layer |
| `lora` | `Lora`: thin matrices beside frozen projections |
| `prefix_tuning` | `PrefixTuning`: learned keys and values before those of every attention |
| `houlsby_adapter` | `HoulsbyAdapter`: a bottleneck behind each sublayer |
| `adapter_hub` | bottlenecks as the library adapters stores them |
| `peft_lora` | LoRA as the library peft stores it |
| `structured_pruning` | `StructuredPruning`: adapters beside what stays, masks for what vanishes |
| `pruning` | which groups vanish, and when |
| `pruning_slices` | the smaller model that pruning leaves |
| `pruning_groups` | which leaves belong to a group |
| `norms` | `Norms`: the base's norms are trained |
| `full` | `Full`: every leaf of the base is trained |
| `combining` | several adapters of one base as one |
| `comparisons` | the methods that `coda bench` sets side by side |
| `version_1` | methods as the first version's files wrote them |
"""

from collections.abc import Iterable

from coda_jax import checks
from coda_jax.methods import adapter_hub, peft_lora
from coda_jax.methods.base import (
    Method,
    acting,
    check_packs,
    check_start,
    check_steps,
    created,
    finish,
    least_steps,
    merge,
    partition,
    trained,
)
from coda_jax.methods.coda import (
    ATTENTIONS,
    REDUCTION,
    Coda,
    check_reduction,
    dense_routing,
    epsilon_of,
    max_segments,
    reduction_of,
    unrouted,
    with_epsilon,
    with_reduction,
    with_room_of,
    with_tuning_of,
)
from coda_jax.methods.combining import combine_adapters
from coda_jax.methods.full import Full
from coda_jax.methods.houlsby_adapter import HoulsbyAdapter
from coda_jax.methods.lora import Lora
from coda_jax.methods.norms import Norms
from coda_jax.methods.parallel_adapter import ParallelAdapter
from coda_jax.methods.prefix_tuning import PrefixTuning
from coda_jax.methods.pruning_slices import sliced
from coda_jax.methods.soft_topk import EPSILON
from coda_jax.methods.structured_pruning import StructuredPruning

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Lora,
        StructuredPruning,
        PrefixTuning,
        HoulsbyAdapter,
        Coda,
        ParallelAdapter,
        Norms,
        Full,
    )
}

PEFT = {form.KIND: form for form in (peft_lora,)}  # how the library peft stores methods
ADAPTER_HUB = {form.KIND: form for form in (adapter_hub,)}  # and the library adapters

__all__ = [
    "ADAPTER_HUB",
    "ATTENTIONS",
    "EPSILON",
    "METHODS",
    "PEFT",
    "REDUCTION",
    "Method",
    "acting",
    "check_packs",
    "check_reduction",
    "check_start",
    "check_steps",
    "combine_adapters",
    "created",
    "dense_routing",
    "epsilon_of",
    "find",
    "finish",
    "least_steps",
    "max_segments",
    "merge",
    "ordered",
    "partition",
    "reduction_of",
    "sliced",
    "trained",
    "unrouted",
    "with_epsilon",
    "with_reduction",
    "with_room_of",
    "with_tuning_of",
    *(method.__name__ for method in METHODS.values()),
]


def find(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        ValueError: there is none; the names are listed.
    """
    if name not in [*METHODS]:
        raise ValueError(f"method {name!r} is unknown; it must be one of {[*METHODS]}")
    return METHODS[name]


def ordered(methods: Iterable[Method]) -> tuple[Method, ...]:
    """The methods in the order of `METHODS`, which is that in which they wrap a layer.

    Raises:
        ValueError: something is not a method, or there are two of one kind.
    """
    several = isinstance(methods, Iterable) and not isinstance(methods, str)
    methods = tuple(methods) if several else (methods,)
    for method in methods:
        if not isinstance(method, Method):
            raise checks.wrong("methods", "methods such as those of METHODS", method)
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"methods must be of different kinds, got two of {twice}")
    order = [*METHODS]
    return tuple(sorted(methods, key=lambda method: order.index(find(method.name).name)))
