"""Tiny models and the calls that most tests make of them."""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
import tarfile
import types

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from coda_jax import trees
from coda_jax.methods import Coda, Method, ParallelAdapter, partition
from coda_jax.models import FAMILIES
from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.models.t5.config import T5Config
from coda_jax.models.w2v_bert.config import W2vBertConfig
from coda_jax.nn import dot_product_attention, processors
from coda_jax.nn.tokens import Tokens, join_frames, selections

GOLDEN = Path(__file__).parent / "golden"
TINY, TINY_IMAGES, TINY_SPEECH = (
    FAMILIES[config.family].tiny for config in (T5Config, Pix2StructConfig, W2vBertConfig)
)
ADAPTER = ParallelAdapter(bottleneck=4)

# T5X's run files configure the script that runs. gin knows one of them in a process.
T5X_SCRIPT = types.ModuleType("__main__")
T5X_SCRIPT.train, T5X_SCRIPT.evaluate, T5X_SCRIPT.infer, T5X_SCRIPT.precompile = (
    lambda **kwargs: kwargs for _ in range(4)
)


def config(coda=None, adapter=None, base=TINY, **changes):
    """Returns a tiny config with changes; a dict as `coda` is what differs from its defaults."""
    if isinstance(coda, dict):
        coda = Coda(**coda)
    if coda is not None and adapter is None:
        adapter = ADAPTER
    methods = tuple(method for method in (coda, adapter) if method is not None)
    return dataclasses.replace(base, **{"methods": methods, **changes})


def method_of(cfg, kind: type[Method]):
    """Returns the config's method of a kind."""
    (found,) = [method for method in cfg.methods if isinstance(method, kind)]
    return found


def with_coda(cfg, **changes):
    """Returns the config with other values for fields of its `Coda`."""
    coda = dataclasses.replace(method_of(cfg, Coda), **changes)
    others = [method for method in cfg.methods if not isinstance(method, Coda)]
    return cfg.replace(methods=(coda, *others))


def shapes(cfg):
    """Returns what `init` makes, as shapes: the collections "params" and "params_axes"."""
    init = functools.partial(cfg.network().init, enable_dropout=False)
    return jax.eval_shape(init, jax.random.key(0), *cfg.init_inputs())


def random_params(cfg, seed=0, fresh=False):
    """Returns parameters with nothing zero or one in them, as after training.

    Args:
        cfg: the model's config.
        seed: of the random numbers.
        fresh: whether the adapters are as new, with a zero up-projection.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path.endswith("norm/scale"):
            values = 1 + 0.2 * values
        elif path.endswith("query/kernel"):
            values *= (leaf.shape[0] * cfg.head_dim) ** -0.5
        elif path.endswith("kernel"):
            values *= leaf.shape[0] ** -0.5
        if fresh and path.endswith("adapter/wo/kernel"):
            values *= 0
        return jnp.asarray(values, leaf.dtype)

    flat = trees.flatten(shapes(cfg)["params"])
    return trees.unflatten({path: draw(path, leaf) for path, leaf in flat.items()})


def adapted_params(cfg, base, seed=0):
    """Returns the parameters of an adapted model: the base's, with every trained leaf another."""
    trained, _ = partition(cfg, random_params(cfg, seed))
    _, frozen = partition(cfg, base)
    return trees.merge(jax.tree.map(np.asarray, trained), frozen)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, inputs, decoder_inputs, targets, segments=None, target_segments=None):
    """Returns the logits [B, T, V], without dropout."""
    return cfg.network().apply(
        {"params": params},
        inputs,
        decoder_inputs,
        targets,
        segments,
        target_segments,
        enable_dropout=False,
    )


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg, params, inputs, segments=None):
    """Returns (the encoder's output [B, N, D], {layer: its Selection})."""
    encoded, state = cfg.network().apply(
        {"params": params},
        inputs,
        segments,
        enable_dropout=False,
        method="encode",
        mutable=["intermediates"],
    )
    return encoded, selections(state.get("intermediates", {}))


def solution(scores, k, epsilon):
    """Returns the soft top-k of one row in float64.

    It is the root in `a` of sum(min(1, exp((s + a) / eps))) = k.
    """
    scores = np.asarray(scores, np.float64)
    if k >= len(scores):
        return np.ones_like(scores)

    def weights(a):
        return np.exp(np.minimum((scores + a) / epsilon, 0))

    # With this `a` all are at least 1 / N * k; with that one, even all together are at most k.
    low = epsilon * np.log(k / len(scores)) - scores.max()
    high = -scores.min()
    a = brentq(lambda a: weights(a).sum() - k, low - 1e-9, high + 1e-9, xtol=1e-14, rtol=1e-15)
    return weights(a)


def gelu(x):
    """GELU's tanh form in numpy, which T5 v1.1 was trained with."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def random_tokens(rng, lengths, num_tokens, vocab_size=TINY.vocab_size):
    """Returns int32 tokens [len(lengths), num_tokens] of 2..vocab_size-1, then 0 for padding."""
    tokens = rng.integers(2, vocab_size, (len(lengths), num_tokens))
    return np.where(np.arange(num_tokens) < np.array(lengths)[:, None], tokens, 0).astype(np.int32)


def layer_tokens(rng, batch=3, length=12, width=4, mask=None, segment_ids=None):
    """Returns the random `Tokens` of a layer; without a mask there is no padding."""
    x = jnp.asarray(rng.normal(size=(batch, length, width)).astype(np.float32))
    return Tokens(
        x=x,
        u=jnp.tanh(x),
        positions=jnp.arange(length)[None],
        mask=jnp.ones((batch, length), bool) if mask is None else jnp.asarray(mask),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
    )


def random_patches(rng, sizes, num_patches, patch_size=TINY_IMAGES.patch_size):
    """Returns float32 patches [len(sizes), num_patches, C] of images of (rows, columns) patches."""
    patches = np.zeros((len(sizes), num_patches, 2 + 3 * patch_size**2), np.float32)
    for image, (rows, columns) in zip(patches, sizes, strict=True):
        ids = np.stack(np.mgrid[1 : rows + 1, 1 : columns + 1], -1).reshape(-1, 2)
        image[: len(ids), :2] = ids
        image[: len(ids), 2:] = rng.normal(size=(len(ids), image.shape[1] - 2))
    return patches


def random_frames(rng, lengths, num_frames, feature_dim=TINY_SPEECH.feature_dim):
    """Returns float32 frames [len(lengths), num_frames, 1 + feature_dim], then 0 for padding."""
    features = rng.normal(size=(len(lengths), num_frames, feature_dim)).astype(np.float32)
    mask = np.arange(num_frames) < np.array(lengths)[:, None]
    return np.asarray(join_frames(jnp.where(mask[..., None], features, 0), mask))


def shift_right(targets):
    """Returns the decoder's input: the targets a place later, with 0 in front."""
    return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def pack(rows, num_tokens):
    """Returns (tokens [1, num_tokens], segment ids 1.. [1, num_tokens]) of rows in one row."""
    tokens, segments = np.zeros((2, 1, num_tokens), np.int32)
    start = 0
    for i, row in enumerate(rows):
        tokens[0, start : start + len(row)] = row
        segments[0, start : start + len(row)] = i + 1
        start += len(row)
    return tokens, segments


def unpack(name, folder):
    """Unpacks an archive of the golden files into a folder, which is returned."""
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def assert_same_tree(first, second):
    """The same paths, dtypes and bits."""
    first, second = trees.flatten(first), trees.flatten(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.dtype == second[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes(), path


@contextlib.contextmanager
def as_with_bfloat16(products=True):
    """What is traced meanwhile is for a CPU that has products of bfloat16, or has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processors, "multiplies_bfloat16", lambda: products)
        yield


@contextlib.contextmanager
def without_loops():
    """What is traced meanwhile has attention without loops, of which XLA counts only one round."""
    with as_with_bfloat16(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dot_product_attention, "_WORTH_A_ROUND", math.inf)
        yield


@contextlib.contextmanager
def as_on_tpu():
    """What is traced meanwhile takes the branches that a TPU takes."""
    usual = lax.platform_dependent

    def on_tpu(*arguments, default=None, **by_platform):
        branch = by_platform.get("tpu", default)
        return branch(*arguments) if branch else usual(*arguments, **by_platform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lax, "platform_dependent", on_tpu)
        yield


def golden_logits(cfg, params, golden):
    """The logits of the batch in a golden file."""
    names = ("encoder", "decoder_inputs", "decoder_targets")
    return np.asarray(logits(cfg, params, *(golden[name] for name in names)))
