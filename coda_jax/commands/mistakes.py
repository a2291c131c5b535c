"""Which errors are a user's mistakes, and what is printed of them.

A mistake is told by its type: a value, a file, numbers that are not finite, a missing package, too
little memory. An error of another type, or one that JAX, Flax or a program of T5X raise themselves,
is one of the program and keeps its traceback.
"""

import re
import sys

_TYPES = (ValueError, OSError, FloatingPointError, MemoryError, EOFError)
_INNER = (
    "jax",
    "jaxlib",
    "flax",
)  # a ValueError from there is about shapes, not about what was given
_LINES, _LISTED, _WIDTH = 3, 40, 600
# What gin puts behind a message: the functions through which the error came.
_ADDED = re.compile(
    r"\n  (?:In call to configurable '.*|No values supplied by Gin.*|Gin had values bound for.*|"
    r"Caller supplied values for.*|In file .* line \d+\n.*|In bindings string line \d+\n.*)"
)
_ERRNO = re.compile(r"^\[Errno -?\d+\] ([^:]+)(?:: (.*))?$", re.DOTALL)


def exit_code(error: BaseException) -> int:
    """What a process ends with."""
    return getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)


def told(error: BaseException) -> str | None:
    """A mistake in a line or a few, None for an error of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    message = _ADDED.sub("", str(error)).strip()
    if exit_code(error) > 2:  # stopped on request: the command that goes on stays whole
        return message
    message = _with_macros(_shortened(message))
    if getattr(error, "exit_code", None) is not None:
        return message
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in message:
        asked = re.search(r"llocating (\d+) bytes", message)
        size = f"{int(asked[1]) / 2**30:.1f} GiB" if asked else message.splitlines()[0]
        return f"out of memory: {size}\nA smaller batch, or shorter inputs, need less"
    if isinstance(error, ModuleNotFoundError) and "pip install" in message:
        return message
    homes = _raised_through(error)
    home = homes[-1] if homes else ""
    if home != "gin" and (not isinstance(error, _TYPES) or home in _INNER):
        return None
    ours_or_t5xs = [package for package in homes if package in ("coda_jax", "t5x")]
    if home != "gin" and ours_or_t5xs[-1:] == ["t5x"]:
        return None
    if isinstance(error, MemoryError):
        return f"out of memory{': ' * bool(message)}{message}"
    if isinstance(error, OSError) and (found := _ERRNO.match(message)):
        what, path = found.groups()
        return f"{path}: {what[0].lower()}{what[1:]}" if path else what
    return message or type(error).__name__


def _shortened(message: str) -> str:
    """At most three lines beside lists, whose lines are indented, and nothing very long."""
    message = message.encode("utf-8", "backslashreplace").decode()  # so that it can be printed
    lines = [x if len(x) <= _WIDTH else f"{x[:_WIDTH]} ..." for x in message.split("\n")]
    plain = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    if len(plain) > _LINES:
        lines = [*lines[: plain[_LINES - 1]], "... (--traceback shows the rest)"]
    listed = [number for number, line in enumerate(lines) if line.startswith(" ")]
    if len(listed) > _LISTED:
        more = f"  ... and {len(listed) - _LISTED} more (--traceback shows all)"
        lines[listed[_LISTED] : listed[-1] + 1] = [more]
    return "\n".join(lines)


def _with_macros(message: str) -> str:
    """Parameters, as "Class.field", with the macros that gave them, by which people know them."""
    if "gin.config" not in sys.modules:
        return message
    given: dict[str, set[str]] = {}
    for (_, selector), values in sys.modules["gin.config"]._CONFIG.items():
        for name, value in values.items():
            if str(value).startswith("%"):
                called = f"{selector.rpartition('.')[2]}.{name}"
                given.setdefault(called, set()).add(str(value)[1:])
    for called, macros in given.items():
        if len(macros) == 1:
            shown = f"{called} ({min(macros)})"
            message = re.sub(rf"\b{re.escape(called)}\b", lambda _, x=shown: x, message, count=1)
    return message


def _raised_through(error: BaseException) -> list[str]:
    """The packages through whose code an error came; the last one raised it."""
    trace, names = error.__traceback__, []
    while trace is not None:
        names.append((trace.tb_frame.f_globals.get("__name__") or "").partition(".")[0])
        trace = trace.tb_next
    return names
