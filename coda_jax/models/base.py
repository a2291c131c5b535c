"""What a family of models is: the record that every folder here fills in.

A family is a configuration class, whose instances say what their network is, and a `Family`, which
says what else differs: published sizes, checkpoints of Hugging Face, how inputs are read.

Axis letters: B batch, N input tokens, C channels, D embedding, V vocabulary.
"""

import collections
from collections.abc import Callable, Container, Iterator, Mapping
import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from coda_jax import checks, processes, trees
from coda_jax.methods import Method, ordered
from coda_jax.methods.base import Place
from coda_jax.models import hf_fields
from coda_jax.nn.remat import POLICIES
from coda_jax.sharding import Placement

MAX_LAYERS = 1000  # of a stack: a file that says more would keep whoever reads it busy for hours


@dataclasses.dataclass(frozen=True)
class Projection:
    """A frozen matrix of a layer, as methods that change projections and counts of FLOPs see it.

    Attributes:
        path: of its module within the layer, such as "attention/query".
        inputs: rows of the matrix.
        outputs: its columns.
        rows: what it is applied to: the "tokens" that the layer works on, or the "context" that
            they attend to.
    """

    path: str
    inputs: int
    outputs: int
    rows: str = "tokens"


@struct.dataclass
class ModelConfig:
    """Sizes and options that all families have.

    Attributes:
        family: name of the family, the same for all its models, as in manifests.
        heads: patterns of the leaves that a base may lack: they are then created, and trained and
            saved with what the methods create.
        head_fields: what such a base, which `lacks_head`, does not say.
        run_fields: how a run computes, in which two runs of one model may differ.
        blocks: {stack: {a block of its layers, an attention or a feed-forward: the field that says
            its size, which is heads or hidden channels}}.
        field_checks: what the value of each field must be, but for `methods`.
        vocab_size: V.
        dtype: of the computation, float32 or bfloat16.
        emb_dim: D.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        dropout_rate: used where `enable_dropout` is set.
        remat_policy: what a layer computes again for its gradient, see `nn.remat`.
        pad_id: the token that fills up a row.
        eos_id: the token that ends a target; -1 where none does.
        decoder_start_id: the token from which a decoder starts.
        layer_sizes: ((path of a block, its size), ...) where it is not that of `blocks`, such as
            (("encoder/layers_0/attention", 3),); pruning leaves such models.
        methods: how the model is adapted, in the order of `methods.METHODS`; () for a dense model.
    """

    family: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    head_fields: ClassVar[tuple[str, ...]] = ()
    run_fields: ClassVar[tuple[str, ...]] = ("dtype", "dropout_rate", "remat_policy")
    blocks: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    field_checks: ClassVar[Mapping[str, checks.Check]] = {
        **dict.fromkeys(("vocab_size", "emb_dim"), checks.COUNT),
        "num_encoder_layers": checks.Whole(1, MAX_LAYERS),
        "num_decoder_layers": checks.Whole(0, MAX_LAYERS),
        **dict.fromkeys(("pad_id", "decoder_start_id"), checks.Whole(0)),
        "eos_id": checks.Whole(-1),
        "dropout_rate": checks.Number(least=0, below=1),
        "dtype": checks.dtype,
        "remat_policy": checks.OneOf([*POLICIES]),
        "layer_sizes": checks.Each(checks.Pair(checks.text, checks.COUNT)),
    }

    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout_rate: float = 0.1
    remat_policy: str = "none"
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0
    layer_sizes: tuple[tuple[str, int], ...] = ()
    methods: tuple[Method, ...] = ()

    def __post_init__(self):
        checks.fields(self, **self.field_checks)
        for name in ("pad_id", "eos_id", "decoder_start_id"):
            if (token := getattr(self, name)) >= self.vocab_size > 0:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be below vocab_size={self.vocab_size}, "
                    f"got {token}"
                )
        self._check_layer_sizes()
        object.__setattr__(self, "methods", ordered(self.methods))
        for method in self.methods:
            method.validate(self)

    def _check_layer_sizes(self):
        if not self.layer_sizes:
            return
        paths = [path for path, _ in self.layer_sizes]
        places = [place for stack in self.blocks for place in self.places(stack)]
        known = {f"{place.path}/{block}" for place in places for block in self.blocks[place.stack]}
        counts = collections.Counter(paths)
        wrong = sorted(path for path, count in counts.items() if path not in known or count > 1)
        if wrong:
            raise ValueError(
                f"{type(self).__name__}.layer_sizes names {wrong}, which must be blocks of the "
                f"model, each once, such as {min(known, default=None)}"
            )

    def places(self, stack: str) -> list[Place]:
        """The layers of the "encoder" or the "decoder"."""
        number = self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers
        return [Place(stack, index, number) for index in range(number)]

    def size_of(self, place: Place, block: str) -> int:
        """The heads of an attention of a layer, or the hidden channels of a feed-forward."""
        usual = getattr(self, self.blocks[place.stack][block])
        return dict(self.layer_sizes).get(f"{place.path}/{block}", usual)

    def dense(self) -> "ModelConfig":
        """The same model without methods."""
        return self.replace(methods=())

    @property
    def lacks_head(self) -> bool:
        """Whether there is no output layer yet; by default there is one."""
        return False

    def encoder_only(self) -> "ModelConfig":
        """The same encoder without a decoder.

        Raises:
            ValueError: the family has no encoders alone.
        """
        raise ValueError(f"a {self.family!r} is not used without its decoder")

    def differences(self, other: "ModelConfig", skipped: Container[str] = ()) -> list[str]:
        """Each field with another value than in a config of the same family, as text.

        Args:
            other: what it is compared with.
            skipped: fields that may differ.
        """
        ours, theirs = (dict(config._values(skipped)) for config in (self, other))
        return [
            f"{name}={value!r}, not {theirs[name]!r}"
            for name, value in ours.items()
            if name in theirs and value != theirs[name]
        ]

    def _values(self, skipped: Container[str]) -> Iterator[tuple[str, Any]]:
        """(name, value) of each field, and of those of each method."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in skipped:
                continue
            if field.name == "methods":
                for method in value:
                    for own in dataclasses.fields(method):
                        yield f"{type(method).__name__}.{own.name}", getattr(method, own.name)
                value = [method.name for method in value]
            yield field.name, value

    def misplaced(self, inputs: np.ndarray) -> str | None:
        """Why the network has no places for inputs [n, ...]; None where it has."""
        del inputs

    def network(self) -> nn.Module:
        """The network of this configuration."""
        raise NotImplementedError

    def input_spec(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the encoder's inputs, [B, N, ...]."""
        raise NotImplementedError

    def init_inputs(self) -> tuple[Array, ...]:
        """Arguments with which the network makes its parameters."""
        raise NotImplementedError

    def projections(self, place: Place) -> tuple[Projection, ...]:
        """The frozen matrices of a layer."""
        raise NotImplementedError

    def mixing_flops(self, place: Place, tokens: int, context: int) -> float:
        """Operations of a layer beside its projections: what mixes the tokens of a row.

        Args:
            place: of the layer.
            tokens: of a row, that the layer works on.
            context: tokens that they attend to; for a decoder, those of the encoder.
        """
        raise NotImplementedError

    def output_flops(self, inputs: int, targets: int) -> float:
        """Operations that make outputs of vectors: of each target, each input, or their mean."""
        raise NotImplementedError

    def input_flops(self, length: int) -> float:
        """Operations that make N inputs of a row vectors."""
        del length
        return 0.0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a family.

    Attributes:
        unit: what a place of a row is: "tokens", "patches" or "frames".
        random: (config, rng, B, N) -> [B, N, ...] inputs that fill their rows.
        field: of a request of `coda predict`, that has its input: a text, or the name of a file.
        others: further fields of a request that are read.
        reads_files: whether `field` has the name of a file.
        encoder: (config, vocabulary, N, font) -> (request -> its inputs [n, ...]), n at most N
            where what is longer cannot be cut.
        shown: (inputs [n, ...] of a row, vocabulary) -> what people see of them: "kind" and, for
            "text", "pieces", a text for each; for "image", "image" [height, width, 3] uint8 and
            "grid", rows and columns of patches; for "sound", "spectrogram" [windows, bins] and
            "seconds" of a frame.
        served: the module that reads them where coda_jax is not: inputs.py of an exported folder.
        longest: the most of them that are kept where nobody says another limit.
        problem: (request) -> why it is none; None where it is.
        held: requests that are held at once, to be sorted by length; None for a few batches.
        of_checkpoint: (these, folder of a checkpoint, its config) -> those of the checkpoint, whose
            own files may say more.
    """

    unit: str
    random: Callable[[Any, np.random.Generator, int, int], np.ndarray]
    field: str
    encoder: Callable[..., Callable[[Mapping[str, str]], np.ndarray]]
    shown: Callable[[np.ndarray, Any], dict[str, Any]]
    served: pathlib.Path
    longest: int = 512
    others: tuple[str, ...] = ()
    reads_files: bool = False
    problem: Callable[[Mapping[str, Any]], str | None] = lambda request: None
    held: int | None = None
    of_checkpoint: Callable[["Inputs", pathlib.Path, Any], "Inputs"] = lambda inputs, *_: inputs


def refuse_font(font: str | None) -> None:
    """Raises ValueError where there is a font, for inputs that have no headers."""
    if font is not None:
        raise ValueError(f"HEADER_FONT={font!r} has no effect: only images have headers")


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """The checkpoints of a family in Hugging Face's layout.

    Attributes:
        model_types: values of `model_type` in config.json.
        parse_config: (fields, name of the file) -> the dense config.
        format_config: (dense config, name of the weights' dtype) -> fields.
        tensor_name: (path of a leaf, config) -> the tensor's name.
        resolve_tensors: (tensors, fields, name of the file) -> those that are leaves, each once.
        tensor_shape: (path, shape of a leaf) -> the tensor's shape.
        refused: {model_type of a similar family: why it is none, and what to take instead}.
    """

    model_types: tuple[str, ...]
    parse_config: Callable[[Mapping[str, Any], str], ModelConfig]
    format_config: Callable[[Any, str], dict[str, Any]]
    tensor_name: Callable[[str, Any], str]
    resolve_tensors: Callable[[dict, Mapping[str, Any], str], dict]
    tensor_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = hf_fields.tensor_shape
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: the class of its configurations.
        presets: published sizes by name.
        tiny: a config of a few thousand parameters, for tests and examples.
        objectives: (config) -> names of the objectives that it may be trained for, the usual first.
        huggingface: its checkpoints.
        inputs: how its inputs are read and made up.
        profile_scopes: {part of a profile: names of the modules that belong to it}.
        infer_config: (tree of leaves) -> the config that their shapes tell; None where they do not.
    """

    config: type[ModelConfig]
    presets: Mapping[str, ModelConfig]
    tiny: ModelConfig
    objectives: Callable[[Any], tuple[str, ...]]
    huggingface: HuggingFace
    inputs: Inputs
    profile_scopes: Mapping[str, tuple[str, ...]]
    infer_config: Callable[[Mapping[str, Any]], ModelConfig] | None = None

    @property
    def name(self) -> str:
        """The family's name in manifests."""
        return self.config.family


def init_params(config: ModelConfig, rng: Array) -> dict[str, Any]:
    """The fresh parameter tree of a config's network."""
    return _init(config, rng)["params"]


def _init(config, rng):
    return config.network().init(rng, *config.init_inputs(), enable_dropout=False)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` that a config's network expects."""
    return trees.unflatten(_made(config)["params"])


def param_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """{path: the logical names of the axes} of the parameters; see `sharding.AXIS_RULES`."""
    axes = _made(config)["params_axes"]
    return {path.removesuffix("_axes"): tuple(leaf.names) for path, leaf in axes.items()}


def check_divides(config: ModelConfig, placement: Placement) -> None:
    """Raises ValueError where devices cannot share what a config's network divides."""
    fields = dict.fromkeys(x for blocks in config.blocks.values() for x in blocks.values())
    sizes = {name: getattr(config, name) for name in fields}
    sizes |= {f"layer_sizes[{path!r}]": size for path, size in config.layer_sizes}
    for name, size in sizes.items():
        placement.check(f"{type(config).__name__}.{name}", size, "model")


def placed(config: ModelConfig, params: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The parameters on their devices; see `Placement.params`, and `check_divides`.

    Raises:
        ValueError: devices cannot share the model, or processes have other parameters.
    """
    check_divides(config, placement)
    processes.check_same("the parameters", lambda: trees.flatten(params).values())
    return placement.params(params, param_axes(config))


@functools.lru_cache(maxsize=128)
def _made(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The network's variables by path; tracing a network takes longer than all done with these."""
    variables = jax.eval_shape(functools.partial(_init, config), jax.random.key(0))
    return {name: trees.flatten(variables[name]) for name in ("params", "params_axes")}
