"""What is asked of a decoder: the options of generation, under the names of transformers.

`None` stands for what was not said. `Generation.with_defaults` fills in what a checkpoint says, and
`Generation.resolved` the rest.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from coda_jax import checks

_DEFAULTS = {
    "max_decode_length": 64,
    "num_beams": 1,
    "do_sample": False,
    "num_return_sequences": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "stop_strings": (),
    "decoder_prefix": (),
    "seed": 0,
}
_OF_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_ALPHA, _LENGTH_PENALTY = 0.6, 1.0  # of T5X and of transformers
_EXPONENT = checks.Number(least=-10, most=10)  # of a length, whose power must be a float32
_CHECKS = {
    **dict.fromkeys(("max_decode_length", "num_beams", "num_return_sequences"), checks.COUNT),
    **dict.fromkeys(("min_new_tokens", "no_repeat_ngram_size", "top_k"), checks.Whole(0)),
    "forced_bos_token_id": checks.Whole(0),
    "decoder_prefix": checks.Each(checks.Whole(0)),
    "stop_strings": checks.Each(checks.text),
    "alpha": _EXPONENT,
    "length_penalty": _EXPONENT,
    "early_stopping": checks.OneOf((False, True, "never")),
    "do_sample": checks.flag,
    "temperature": checks.Number(least=1e-6),
    "top_p": checks.Number(least=0, most=1),
    "repetition_penalty": checks.Number(least=1e-3, most=1e3),
    "seed": checks.SEED,
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """How outputs are made: greedily, by beam search, or drawn at random.

    Names and meanings are those of transformers' GenerationConfig, except for `max_decode_length`,
    `alpha`, `decoder_prefix` and `seed`. Every option may be left open.

    Attributes:
        max_decode_length: L, the most tokens of an output, its prefix and the end marker included;
            64 where nothing is said.
        num_beams: 1 for greedy decoding and sampling.
        alpha: beams are ranked by T5X's rules, log p / ((5 + length) / 6)^alpha; 0.6 where no
            length penalty is given.
        length_penalty: beams are ranked by transformers' rules instead, log p / length^penalty.
        early_stopping: when transformers' search stops: True, as soon as `num_beams` outputs have
            ended; False, when the best live beam is unlikely to do better at its present length;
            "never", when no live beam can do better at any length.
        do_sample: draw each token from the model's distribution.
        temperature: the logits are divided by it before a draw.
        top_k: draw from the k most probable tokens; 0 for all, 50 where nothing is said.
        top_p: draw from the fewest tokens that have this probability together.
        num_return_sequences: how many outputs per input: the best beams, or drawn ones.
        min_new_tokens: no end token before there are so many tokens behind the prefix; a stop text
            ends an output all the same.
        no_repeat_ngram_size: no n tokens in a row stand in an output twice; 0 for no limit.
        repetition_penalty: makes the tokens that the decoder has seen less probable, above 1.
        forced_bos_token_id: the first token of every output.
        decoder_prefix: the first tokens of every output.
        stop_strings: an output ends with the token that completes one of these texts.
        seed: of the draws. They depend on it, on the number of the input, on that of the output and
            on the place in it, and on nothing else.

    Raises:
        ValueError: a value is out of its range.
    """

    max_decode_length: int | None = None
    num_beams: int | None = None
    alpha: float | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_return_sequences: int | None = None
    min_new_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    forced_bos_token_id: int | None = None
    decoder_prefix: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self):
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        checks.fields(self, **{name: _CHECKS[name] for name in self.given_options})

    def _called(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    @property
    def given_options(self) -> dict[str, Any]:
        """The options that are given."""
        names = (field.name for field in dataclasses.fields(Generation))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def with_defaults(self, defaults: Mapping[str, Any]) -> tuple["Generation", dict[str, Any]]:
        """Takes what a checkpoint says where nothing is given here.

        Args:
            defaults: options by name, such as those of a generation_config.json.

        Returns:
            The options, and those of `defaults` that were taken and change something.
        """
        said = self.given_options
        # Of a search and a draw, what is asked for here takes precedence.
        unwanted = {"do_sample"} if said.get("num_beams", 1) > 1 else set()
        unwanted |= {"num_beams"} if said.get("do_sample") else set()
        defaults = {name: value for name, value in defaults.items() if name not in unwanted}
        taken = {name: value for name, value in defaults.items() if name not in said}
        found = taken | said
        theirs = found.get("num_beams", 1) > 1 and (
            defaults.get("num_beams", 1) > 1
            or defaults.get("early_stopping")
            or "length_penalty" in found
        )
        if theirs and "alpha" not in said:
            taken.setdefault("length_penalty", _LENGTH_PENALTY)
            dropped = set()
        else:
            dropped = {"length_penalty", "early_stopping"}
        if not found.get("do_sample"):
            dropped |= _OF_SAMPLING.keys()
        if said.get("decoder_prefix"):
            dropped.add("forced_bos_token_id")
        if "min_new_tokens" in taken:
            longest = found.get("max_decode_length", _DEFAULTS["max_decode_length"])
            taken["min_new_tokens"] = min(taken["min_new_tokens"], longest)
        neutral = _DEFAULTS | _OF_SAMPLING
        taken = {
            name: value
            for name, value in taken.items()
            if name not in (dropped | said.keys()) and value != neutral.get(name)
        }
        return dataclasses.replace(self, **taken), taken

    def resolved(self) -> "Generation":
        """The options with nothing left open.

        Of the two ways of ranking beams, and of the options of sampling, those that are not in use
        stay None.

        Raises:
            ValueError: options contradict each other.
        """
        given = {name: value for name, value in _DEFAULTS.items() if getattr(self, name) is None}
        made = dataclasses.replace(self, **given)
        if made.alpha is not None and made.length_penalty is not None:
            raise ValueError(
                f"{self._called('alpha')}={made.alpha} ranks beams as T5X does, "
                f"length_penalty={made.length_penalty} as transformers does: give one of them"
            )
        if made.early_stopping is not None and made.length_penalty is None:
            raise ValueError(
                f"{self._called('early_stopping')}={made.early_stopping!r} is of transformers' beam"
                f" search: give its length_penalty too, {_LENGTH_PENALTY} in transformers"
            )
        _check_sampling(made)
        given = _OF_SAMPLING if made.do_sample else {}
        if made.length_penalty is None:
            given = given | {"alpha": _ALPHA}
        else:
            given = given | {"early_stopping": False}
        given = {name: value for name, value in given.items() if getattr(made, name) is None}
        made = dataclasses.replace(made, **given)
        _check_lengths(made)
        return made


def _check_sampling(options: Generation) -> None:
    """Raises ValueError where options of sampling and of search are mixed."""
    called = type(options).__name__
    if options.do_sample and options.num_beams > 1:
        raise ValueError(
            f"{called}.num_beams={options.num_beams} searches, do_sample=True draws: set "
            "num_beams=1 or do_sample=False"
        )
    given = {name: getattr(options, name) for name in _OF_SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not options.do_sample:
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{called}: {said} needs do_sample=True")
    if options.num_return_sequences > options.num_beams and not options.do_sample:
        raise ValueError(
            f"{called}.num_return_sequences={options.num_return_sequences} needs at least as many "
            f"beams, got num_beams={options.num_beams}, or do_sample=True"
        )


def _check_lengths(options: Generation) -> None:
    """Raises ValueError where lengths and the start of the outputs contradict each other."""
    called = type(options).__name__
    if options.min_new_tokens > options.max_decode_length:
        raise ValueError(
            f"{called}.min_new_tokens={options.min_new_tokens} is more than "
            f"max_decode_length={options.max_decode_length}"
        )
    if len(options.decoder_prefix) >= options.max_decode_length:
        raise ValueError(
            f"{called}.decoder_prefix has {len(options.decoder_prefix)} tokens: none is left of "
            f"max_decode_length={options.max_decode_length}"
        )
    if options.decoder_prefix and options.forced_bos_token_id is not None:
        raise ValueError(
            f"{called}.decoder_prefix and forced_bos_token_id={options.forced_bos_token_id} both "
            "say the first token: give one"
        )
