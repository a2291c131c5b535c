"""Bottlenecks as the library adapters (AdapterHub) stores them: options, places, names of leaves.

Of a sublayer with input x (before its norm) and output z, the library computes

    original_ln_before=False, original_ln_after=True   x + z + s B(z)       double_seq_bn, "houlsby"
    both True, residual_before_ln=True                 x + z + s B(x + z)   seq_bn, "pfeiffer"
    is_parallel=True, original_ln_after=True           x + z + s B(x)       par_bn

with B(v) = act(v W_down + b_down) W_up + b_up. (The options are named after norms behind sublayers,
which a T5 has not.) The factor s is multiplied into W_up and b_up.

Axis letters: D embedding, W width of the bottleneck.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from coda_jax.methods.base import Method
from coda_jax.methods.houlsby_adapter import HoulsbyAdapter

KIND = None  # its `architecture`
METHOD = HoulsbyAdapter
LEAVES = {  # the end of the library's name of a tensor, and our leaf
    "adapter_down.0.weight": "houlsby/wi/kernel",
    "adapter_down.0.bias": "houlsby/wi/bias",
    "adapter_up.weight": "houlsby/wo/kernel",
    "adapter_up.bias": "houlsby/wo/bias",
}
SCALING = "scaling"  # the tensor of a learned s
_PLACES = {  # the option that puts an adapter behind a sublayer
    "mh_adapter": ("attention", "self_attention"),
    "cross_adapter": ("encoder_decoder_attention",),
    "output_adapter": ("mlp",),
}
_DEFAULTS = {
    "architecture": None,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "is_parallel": False,
    "scaling": 1.0,
    "cross_adapter": False,
    "leave_out": None,
    # These ask for what there is not.
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "phm_layer": False,
}
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
_REFUSED = ("ln_before", "ln_after", "use_gating", "inv_adapter", "phm_layer")
# What changes no output: the start, training alone, what has no effect without options above.
_OF_NO_EFFECT = {
    "init_weights", "init_weights_seed", "dropout", "stochastic_depth",
    "adapter_residual_before_ln", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W",
    "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range",
    "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
}  # fmt: skip
_NEUTRAL = (None, False, "none", [], {})
# (is_parallel, original_ln_before, residual_before_ln) with original_ln_after, and what is read.
_READS = {
    (False, False, True): "output",
    (False, False, False): "output",
    (False, True, True): "sum",
    **{(True, before, inner): "input" for before in (True, False) for inner in (True, False)},
}
_ACTIVATIONS = {
    "relu": "relu",
    "swish": "swish",
    "silu": "silu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "linear",
}


def read(fields: Mapping[str, Any], width: int, targets: tuple[str, ...], source: str) -> Method:
    """The method of the options in a file.

    Args:
        fields: `config` of adapter_config.json.
        width: W.
        targets: patterns of the sublayers that have an adapter.
        source: the file's name, for errors.

    Raises:
        ValueError: options are missing, or ask for what the method has not.
    """
    values = _checked(fields, source)
    activation = str(values["non_linearity"]).lower()
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{source} has non_linearity={values['non_linearity']!r}, which is none of ours; "
            f"there are {[*_ACTIVATIONS]}"
        )
    return HoulsbyAdapter(
        width,
        _ACTIVATIONS[activation],
        use_bias=True,
        reads=_reads(values, source),
        targets=targets,
        train_norms=False,
    )


def _checked(fields, source):
    """The options with their defaults; refuses those that are unknown or cannot be computed."""
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise ValueError(f"{source} lacks {missing}")
    values = {**_DEFAULTS, **fields}
    known = {*_DEFAULTS, *_REQUIRED, *_OF_NO_EFFECT}
    wrong = {name: values[name] for name in _REFUSED if values[name]}
    wrong |= {n: x for n, x in fields.items() if n not in known and x not in _NEUTRAL}
    if wrong:
        raise ValueError(f"{source} asks for what HoulsbyAdapter has not: {wrong}")
    return values


def _reads(values, source):
    names = ("is_parallel", "original_ln_before", "residual_before_ln")
    found = tuple(values[name] for name in names)
    if all(type(value) is bool for value in (*found, values["original_ln_after"])):
        if values["original_ln_after"] and found in _READS:
            return _READS[found]
        if found == (False, True, False) and not values["original_ln_after"]:
            return "sum"
    given = {name: values[name] for name in (*names, "original_ln_after")}
    raise ValueError(
        f"{source} has {given}, with which a T5 does not keep its residual stream once; right is "
        "original_ln_after=True, beside original_ln_before=True with residual_before_ln=True"
    )


def places(
    fields: Mapping[str, Any], numbers: Mapping[str, int], source: str
) -> tuple[set[str], Mapping[str, float]]:
    """Where a file has adapters, and by what they reduce D.

    Args:
        fields: `config` of adapter_config.json.
        numbers: {path of a sublayer: number of its layer}, the decoder's layers behind the
            encoder's.
        source: the file's name, for errors.

    Returns:
        (the paths, {path: reduction factor}).

    Raises:
        ValueError: options are missing, or have no value for a layer.
    """
    values = _checked(fields, source)
    names = {x for option, places in _PLACES.items() if values[option] for x in places}
    left_out = values["leave_out"] or []
    if not isinstance(left_out, list):
        raise ValueError(f"{source} has leave_out={left_out!r}, which is no list of layers")
    found = {
        path
        for path, number in numbers.items()
        if path.rpartition("/")[2] in names and number not in left_out
    }
    factor = values["reduction_factor"]
    by_layer = factor if isinstance(factor, Mapping) else {"default": factor}
    factors = {x: by_layer.get(str(numbers[x]), by_layer.get("default")) for x in sorted(found)}
    for path, value in factors.items():
        if type(value) not in (int, float) or not 1e-6 <= value <= 1e6:
            raise ValueError(f"{source} has reduction_factor={factor!r}, of no use for {path}")
    return found, factors


def write(method: Method, width: int, found: Iterable[str], numbers: Mapping[str, int]) -> dict:
    """The options of a file.

    Args:
        method: what was trained.
        width: D.
        found: the paths of the sublayers that have an adapter.
        numbers: see `places`.

    Raises:
        ValueError: they have no name in the library.
    """
    found = set(found)
    theirs = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
    if method.activation not in theirs:
        raise ValueError(
            f"the library adapters has no {method.activation!r}; it has {sorted(theirs)}"
        )
    layers = {numbers[path] for path in found}
    names = {path.rpartition("/")[2] for path in found}
    factor = width // method.bottleneck if width % method.bottleneck == 0 else None
    fields = {
        "architecture": None,
        **{option: bool(names & set(places)) for option, places in _PLACES.items()},
        "leave_out": sorted({*numbers.values()} - layers),
        "non_linearity": theirs[method.activation],
        # D // factor is the width: half a channel more keeps clear of rounding.
        "reduction_factor": factor or width / (method.bottleneck + 0.5),
        "scaling": 1.0,
        "is_parallel": method.reads == "input",
        "original_ln_before": method.reads == "sum",
        "original_ln_after": True,
        "residual_before_ln": True,
    }
    if places(fields, numbers, "")[0] != found:
        raise ValueError(
            f"the library adapters has no options for adapters behind {sorted(found)} alone: all "
            "layers that have any have them behind the same kinds of sublayers"
        )
    return fields


def from_library(
    tensors: Mapping[str, Array], fields: Mapping[str, Any], source: str
) -> dict[str, Array]:
    """The leaves of an adapter, {path below its sublayer: leaf}.

    Args:
        tensors: {end of its name: tensor}, as `LEAVES` and `SCALING` have them.
        fields: `config` of adapter_config.json.
        source: the file's name, for errors.

    Raises:
        ValueError: the factor s is neither a number nor learned, lost, or of another width.
    """
    scale = fields.get("scaling", 1.0)
    if scale in ("learned", "channel"):
        if SCALING not in tensors:
            raise ValueError(f"{source} has scaling={scale!r}, but an adapter has no tensor of it")
        scale = jnp.asarray(tensors[SCALING], jnp.float32)
    elif type(scale) is not float or not np.isfinite(scale) or SCALING in tensors:
        raise ValueError(f"{source} has scaling={scale!r}: 'learned', 'channel' or a float")
    leaves = {
        LEAVES[end]: jnp.asarray(tensor, jnp.float32).T
        for end, tensor in tensors.items()
        if end != SCALING
    }
    written = {path: x for path, x in leaves.items() if "/wo/" in path}
    for path, x in written.items():
        if np.ndim(scale) and np.shape(scale)[-1] not in (1, x.shape[-1]):
            raise ValueError(f"{source} has {np.shape(scale)[-1]} factors for {path} {x.shape}")
    return leaves | {path: x * scale for path, x in written.items()}


def to_library(leaves: Mapping[str, Float[Array, "..."]]) -> dict[str, Array]:
    """The inverse of `from_library`, with s = 1 and biases of zero where there are none."""
    found = {end: jnp.asarray(leaves[x], jnp.float32).T for end, x in LEAVES.items() if x in leaves}
    for end in LEAVES:
        weight = end.replace("bias", "weight")
        found.setdefault(end, jnp.zeros(found[weight].shape[0], jnp.float32))
    return found
