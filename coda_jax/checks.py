"""Checks of what people give: numbers, words, dtypes. The one wording of their errors.

A check is called with an option's name and its value. It returns the value as a plain Python one,
or raises a ValueError that names the option, what it must be, and what was given:

    Coda.epsilon must be a number above 0, got -1

A bool is no number, a text is none either, and no number is NaN or infinite. Scalars of numpy and
JAX are numbers. What is computed is float32, so a number must not leave its range, and one that
float32 rounds to a bound which it must not reach is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import os
import re
from re import _parser  # how `re` itself reads a pattern, which nothing public shows
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Check = Callable[[str, Any], Any]

_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT)
_MOST_TIMES = 100  # that a pattern may ask for in a repeat
_MOST_WAYS = 8  # of a pattern: a repeat counts twice, and is tried at each character of a path
_INT32 = 2**31 - 1  # of whole numbers that have no other limit
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_FLOAT16 = ": values of a T5 leave its range (in wo) and become NaN"
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def fields(record: Any, **checks: Check) -> None:
    """Checks fields of a frozen dataclass, under the name CLASS.FIELD, and makes them plain values.

    A value that is traced passes: its number is not known yet.
    """
    for name, check in checks.items():
        value = getattr(record, name)
        if not isinstance(value, jax.core.Tracer):
            value = check(f"{type(record).__name__}.{name}", value)
            object.__setattr__(record, name, value)


def _plain(value: Any) -> Any:
    """A scalar of numpy or JAX as a Python value; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value.item()
    return value


def wrong(name: str, expected: str, value: Any, reason: str = "") -> ValueError:
    """The error of a value that is not what is expected."""
    kind = ", a text" if isinstance(value, str) and "number" in expected else ""
    return ValueError(f"{name} must be {expected}, got {_repr.repr(value)}{kind}{reason}")


def _limits(least: Any, above: Any, most: Any, below: Any) -> str:
    """The limits of a number in words."""
    if least is not None and most is not None:
        return f"from {least} to {most}"
    limits = {"of at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


def _rounded(number: float) -> float:
    """A number within float32's range as float32, whose smallest ones XLA takes for 0."""
    return float(np.float32(number)) if abs(number) >= _SMALLEST else 0.0


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number.

    Attributes:
        least: the least that is allowed.
        most: the most; None for what an int32 holds.
    """

    least: int = 0
    most: int | None = None

    def __call__(self, name: str, value: Any) -> int:
        """The number; see the module."""
        number = _plain(value)
        whole = isinstance(number, int) and not isinstance(number, bool)
        most = _INT32 if self.most is None else self.most
        if whole and self.least <= number <= most:
            return number
        told = most if whole and number > most else self.most
        raise wrong(name, f"a whole number {_limits(self.least, None, told, None)}", value)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number, finite in float32.

    Attributes:
        least: it must not be less; None for no limit.
        above: it must be more.
        most: it must not be more.
        below: it must be less.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __call__(self, name: str, value: Any) -> float:
        """The number; see the module."""
        number = _plain(value)
        if isinstance(number, int | float) and not isinstance(number, bool) and self._has(number):
            return number if abs(number) <= _INT32 else float(number)
        kind, reason = "number", ""
        if isinstance(number, float) and not abs(number) <= _LARGEST:
            kind = "finite number"
        elif isinstance(number, float) and _rounded(number) in (self.above, self.below):
            reason = f", in float32 {_rounded(number)}"
        limits = _limits(self.least, self.above, self.most, self.below)
        raise wrong(name, f"a {kind} {limits}".rstrip(), value, reason)

    def _has(self, number: float) -> bool:
        if not abs(number) <= _LARGEST:  # NaN is not, either
            return False
        rounded = _rounded(number)
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or (number > self.above and rounded > self.above))
            and (self.below is None or (number < self.below and rounded < self.below))
        )


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some values; 1 is not True."""

    allowed: Sequence[Any]

    def __call__(self, name: str, value: Any) -> Any:
        """The value; see the module."""
        plain = _plain(value)
        for allowed in self.allowed:
            if type(plain) is type(allowed) and plain == allowed:
                return allowed
        raise wrong(name, f"one of {tuple(self.allowed)}", value)


@dataclasses.dataclass(frozen=True)
class InstanceOf:
    """An instance of a class."""

    kind: type

    def __call__(self, name: str, value: Any) -> Any:
        """The value; see the module."""
        if not isinstance(value, self.kind):
            raise wrong(name, f"a {self.kind.__name__}", value)
        return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise wrong(name, "True or False", value)
    return plain


def text(name: str, value: Any) -> str:
    """A text that is not empty."""
    plain = _plain(value)
    if not isinstance(plain, str) or not plain:
        raise wrong(name, "a text that is not empty", value)
    return plain


def paths(**values: Any) -> None:
    """Checks arguments that name files or folders; those that are None are not given."""
    for name, value in values.items():
        if value is None or (isinstance(value, str | os.PathLike) and os.fspath(value)):
            continue
        number = isinstance(value, int | float)
        raise wrong(name, "the name of a file or folder", value, f": write ./{value}" * number)


def pattern(name: str, value: Any) -> str:
    """A regular expression that is searched for in no time, as files of strangers hold some."""
    try:
        re.compile(text(name, value))
        choices = [*_choices(_parser.parse(str(value)))]
    except (re.error, RecursionError, OverflowError) as error:
        raise wrong(name, "a regular expression", value, f": {error}") from error
    if sum(choices) > _MOST_WAYS:
        limits = "a regular expression with at most 4 repeats or 8 choices, none within a repeat"
        raise wrong(name, limits, value)
    return str(value)


def _choices(parsed: Iterable, within: int = 1) -> Iterator[int]:
    """For each repeat, or choice, of a pattern how much it may cost; more within a repeat."""
    for operation, argument in parsed:
        parts = _parts(argument)
        if operation in _REPEATS:
            least, most, _ = argument
            yield _MOST_WAYS + 1 if least > _MOST_TIMES else within * (2 if most > 1 else most)
            for part in parts:
                yield from _choices(part, _MOST_WAYS + 1 if most > 1 else within)
            continue
        yield within * (operation is _parser.BRANCH)
        for part in parts:
            yield from _choices(part, within)


def _parts(argument: Any) -> list[Iterable]:
    """The patterns in the argument of an operation."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    return [x for part in argument for x in _parts(part)] if type(argument) in (tuple, list) else []


@dataclasses.dataclass(frozen=True)
class Each:
    """A tuple, or a list, all of whose entries pass a check."""

    check: Check
    least: int = 0

    def __call__(self, name: str, value: Any) -> tuple:
        """The tuple; see the module."""
        if not isinstance(value, tuple | list) or len(value) < self.least:
            entries = f" with at least {self.least} entries" if self.least > 1 else ""
            entries = " that is not empty" if self.least == 1 else entries
            raise wrong(name, f"a tuple{entries}", value)
        return tuple(self.check(f"{name}[{i}]", entry) for i, entry in enumerate(value))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tuple, or a list, of two entries, each of which passes its check."""

    first: Check
    second: Check

    def __call__(self, name: str, value: Any) -> tuple:
        """The tuple; see the module."""
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise wrong(name, "a pair", value)
        return self.first(f"{name}[0]", value[0]), self.second(f"{name}[1]", value[1])


@dataclasses.dataclass(frozen=True)
class Maybe:
    """What a check allows, or None."""

    check: Check

    def __call__(self, name: str, value: Any) -> Any:
        """The value; see the module."""
        return None if value is None else self.check(name, value)


def dtype(name: str, value: Any) -> Any:
    """The type of `jax.numpy` in which there is something to compute or to store.

    Args:
        name: of the option.
        value: a name, a type or a dtype of numpy or JAX.

    Raises:
        ValueError: it is neither float32 nor bfloat16.
    """
    try:
        given = jnp.dtype(value).name
    except (TypeError, ValueError, SyntaxError):
        given = None
    if given not in _DTYPES:
        shown = given if given == "float16" else value
        reason = _FLOAT16 if given == "float16" else ""
        raise wrong(name, " or ".join(map(repr, _DTYPES)), shown, reason)
    return _DTYPES[given]


COUNT = Whole(1)
SEED = Whole(0, 2**32 - 1)
