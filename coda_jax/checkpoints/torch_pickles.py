"""What a pickle of `torch.save` says of a state dict, found out without running it.

`interpret` knows the opcodes and globals that PyTorch writes for a dict of floating point tensors.
It imports and calls nothing that a pickle names, and refuses what it does not know.
"""

from collections.abc import Iterator
import dataclasses
import io
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

MAX_OPCODES = 250_000  # of 5,000 tensors
_DICT, _TENSOR, _PARAMETER = object(), object(), object()  # which no pickle can make
GLOBALS = {
    "collections OrderedDict": _DICT,
    "torch._utils _rebuild_tensor_v2": _TENSOR,
    "torch._utils _rebuild_parameter": _PARAMETER,
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
PROTOCOLS = (2, 3, 4, 5)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}


@dataclasses.dataclass(frozen=True)
class Storage:
    """`numel` elements of a dtype, which lie in the file under a key."""

    dtype: np.dtype
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its storage, in elements. Nothing of it is checked."""

    storage: Storage
    offset: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]


def interpret(stream: io.BytesIO) -> Any:
    """Returns what the next pickle of a stream describes: builtins, `Storage` and `Tensor`.

    Raises:
        ValueError: the pickle holds something else, which is named, or is damaged.
        LookupError, TypeError: it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(start: int) -> list[Any]:
        values = stack[start:]
        del stack[start:]
        return values

    for name, argument in _opcodes(stream):
        match name:
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case _ if name in EMPTY:
                stack.append(EMPTY[name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(-int(name[-1]))))
            case "APPEND" | "APPENDS":
                values = pop(-1 if name == "APPEND" else marks.pop())
                _only(list, stack[-1]).extend(values)
            case "SETITEM" | "SETITEMS":
                items = pop(-2 if name == "SETITEM" else marks.pop())
                _set_items(_only(dict, stack[-1]), items)
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(_global([argument] if argument else pop(-2)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                stack.append(_call(*pop(-2)))
            case "BUILD":
                target, state = pop(-2)
                if set(_only(dict, state)) != {"_metadata"}:  # the versions of a model's modules
                    raise ValueError(
                        "its pickle sets attributes of an object; nothing of it was run"
                    )
                stack.append(_only(dict, target))
            case "PROTO" | "FRAME" if name == "FRAME" or argument in PROTOCOLS:
                pass
            case "STOP":
                (value,) = stack
                return value
            case _:
                raise ValueError(f"its pickle has {_said(name, argument)}; nothing of it was run")


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count == MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES:,} opcodes")
        yield opcode.name, argument


def _said(name: str, argument: Any) -> str:
    return f"the opcode {name}" + (f" {argument!r:.80}" if type(argument) is str else "")


def _global(parts: list) -> Any:
    name = " ".join(_only(str, part) for part in parts)
    if name not in GLOBALS:
        raise ValueError(f"its pickle names {name.replace(' ', '.'):.80}; nothing of it was run")
    return GLOBALS[name]


def _only(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} for a {kind.__name__}")
    return value


def _set_items(target: dict, items: list) -> None:
    """Names are texts: keys that are chosen to collide, such as numbers, would take forever."""
    for name, value in zip(items[::2], items[1::2], strict=True):
        if _only(str, name) in target:
            raise ValueError(f"it holds {name!r:.80} twice")
        target[name] = value


def _storage(value: Any) -> Storage:
    match value:
        case ("storage", np.dtype() as dtype, str(key), str(), int(numel), *view) if not any(view):
            return Storage(dtype, key, numel)
    raise ValueError("its pickle refers to something that is no storage")


def _call(function: Any, arguments: Any) -> Any:
    match arguments:
        case () if function is _DICT:
            return {}
        case (
            Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), dict()
        ) if function is _TENSOR:  # fmt: skip
            return Tensor(storage, offset, size, stride)
        case (Tensor() as tensor, bool(), dict()) if function is _PARAMETER:
            return tensor
    raise ValueError("its pickle calls something in another way than torch.save; nothing was run")
