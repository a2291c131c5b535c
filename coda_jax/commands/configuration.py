"""From gin files and bindings to a configured command: what is given has an effect, or is an error.

After the checks of `gin_macros`, which look at text alone, gin reads the files. The bindings that
the command can reach are then followed from its function, through references and scopes; a binding
of one's own beyond them is an error too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import inspect
import re
from typing import Any

from coda_jax.commands import COMMANDS, load
from coda_jax.commands.gin_files import (
    Binding,
    GinFile,
    UsageError,
    in_order,
    nearest,
    read,
    read_bindings,
    refuse,
    suggested,
)
from coda_jax.commands.gin_macros import (
    check_kinds,
    check_macros,
    check_order_of_t5x,
    check_values,
    displaced,
    unread,
)
from coda_jax.optional import needs

Key = tuple[str, str, str]  # scope, full name of the configurable, parameter
_MACROS = {"num_decodes": "NUM_BEAMS"}  # what people give T5X's own parameters as
_BY_NAME = "coda_jax.commands.loading.configured_methods"  # calls methods that it is given by name


def configure(
    gin_files: Sequence[str],
    search_paths: Sequence[str] = (),
    bindings: Sequence[str] = (),
    command: str | None = None,
) -> None:
    """Reads gin files and bindings.

    Args:
        gin_files: paths, or short names of the package's own files, such as methods/coda.gin; in
            any order, see `gin_files`.
        search_paths: folders in which files are looked for first.
        bindings: as on a line of a gin file, or with texts that lack their quotes.
        command: what is configured; without one, it is not asked what is missing or unused.

    Raises:
        UsageError: a file or a name does not exist, something is missing, or what is given would
            have no effect.
    """
    given = read_bindings(bindings)
    named = [read(name, search_paths) for name in gin_files]
    files = in_order(named)
    for together in (*(file.bindings for file in files), given):
        check_values(together)
    instead: list[Binding] = []
    if command is not None:
        row = COMMANDS[command]
        example = f"for example: coda {command} {row.example}"
        check_kinds(command, named, files, example)
        instead = displaced(files, given, row.either)
        check_macros(example, files, [*instead, *given], row.one_of)
    keys = _parse(files, given, instead)
    if command is not None:
        _check_reached(reachable(load(command)), keys)


def _parse(
    files: Sequence[GinFile], given: Sequence[Binding], instead: Sequence[Binding]
) -> dict[Key, str]:
    """Lets gin read the files and the bindings.

    Args:
        files: in their order.
        given: on the command line.
        instead: what is read before them, in the place of what the files say.

    Returns:
        {key: place} of one's own bindings.
    """
    with needs():  # Here: `coda bench` runs where gin is not installed.
        import gin

    gin.clear_config()
    register_methods()
    keys: dict[Key, str] = {}
    sources = [(file.text(), file.name, file.kind is None) for file in files]
    sources += [(binding.line, binding.place, False) for binding in instead]
    sources += [(binding.line, binding.place, True) for binding in given]
    for text, place, own in sources:
        with _recorded(keys, place if own else None), _explained(place):
            gin.parse_config(text)
    with _explained("gin"):
        gin.finalize()
    return keys


def register_methods() -> None:
    """Lets gin bind any field of any method, whichever recipe is given."""
    with needs():
        import gin

    from coda_jax.methods import METHODS

    for method in METHODS.values():
        gin.external_configurable(method, module="coda_jax.methods")


@contextlib.contextmanager
def _recorded(keys: dict[Key, str], place: str | None) -> Iterator[None]:
    """While open, notes the place of what gin binds, in the context in which it finds the names."""
    from gin import config

    bind = config.bind_parameter

    def bind_and_note(key, value):
        bind(key, value)
        whole = config.ParsedBindingKey.parse(key).scope_selector_arg
        keys.pop(whole, None)
        if place is not None:
            keys[whole] = place

    config.bind_parameter = bind_and_note
    try:
        yield
    finally:
        config.bind_parameter = bind


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """What gin does not understand becomes a UsageError; other errors pass."""
    try:
        yield
    except (ValueError, NameError, AttributeError, SyntaxError, KeyError) as error:
        if not _raised_by(error).startswith("gin."):
            raise
        said = str(error).split("\n")[0]
        raise UsageError(f"{place}: {_with_names(said)}") from None
    except ModuleNotFoundError as error:
        if not _raised_by(error).startswith(("gin.", "importlib")):
            raise
        said = str(error).split("\n")[0]
        raise UsageError(f"{place}: {said}: what a gin file imports must be installed") from None


def _raised_by(error: BaseException) -> str:
    """The name of the module that raised an error."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__") or ""


def _with_names(said: str) -> str:
    """What gin says, in other words, and with the names that may be meant."""
    from gin import config

    if found := re.match(r"Configurable '(.+)' doesn't have a parameter named '(.*)'", said):
        selector, parameter = found.groups()
        names = inspect.signature(config._REGISTRY.get_match(selector).wrapped).parameters
        return f"{selector} has no parameter {parameter!r}{suggested(nearest(parameter, names))}"
    if found := re.match(r"No configurable matching '(.*)'", said):
        name = found[1]
        if (name, "gin.macro") in config._CONFIG:
            return f"{name} is a macro: bind all of it, --gin.{name}=VALUE"
        short = {selector.rpartition(".")[2] for _, selector in config._CONFIG} - {"macro"}
        near = nearest(name.rpartition(".")[2], short)
        return f"there is nothing called {name!r} to configure{suggested(near)}"
    return said


def _check_reached(reached: set[Key], keys: Mapping[Key, str]) -> None:
    """Raises UsageError where a binding of one's own has no effect."""
    from gin import config

    problems = []
    for key, place in keys.items():
        scope, selector, parameter = key
        if key in reached or _configured_from_code(config._REGISTRY[selector]):
            continue
        what = scope if selector == "gin.macro" else selector.rpartition(".")[2]
        others = [other for other in reached if other[1:] == key[1:] and selector != "gin.macro"]
        if others:
            bound = " and ".join(sorted(f"{o[0]}/{what}.{parameter}" for o in others))
            problems.append(f"{place} has no effect: it goes behind {bound}")
        else:
            instead = f"; give {_MACROS[parameter]}" if parameter in _MACROS else ""
            problems.append(
                f"{place} has no effect: nothing that this run uses reads {what}{instead}"
            )
    refuse(problems)


def reachable(function: Callable[..., Any] | None = None) -> set[Key]:
    """The keys of gin's bindings that count when a function is called, and no scope is active.

    Args:
        function: that gin files name; None where a decorator of gin's has made it configurable.
    """
    from gin import config

    start = config._inverse_lookup(function)
    calls = [(start.selector, ())] if start else []
    calls += [
        (selector, tuple(scope.split("/")) if scope else ())
        for scope, selector in config._CONFIG
        if _configured_from_code(config._REGISTRY[selector])
    ]
    return _read_by(calls)


def _read_by(calls: Iterable[tuple[str, tuple[str, ...]]]) -> set[Key]:
    """The keys of gin's bindings that count in some calls: (what is called, its scopes)."""
    from gin import config

    todo, found, seen = list(calls), set(), set()
    while todo:
        selector, scopes = call = todo.pop()
        if call in seen:
            continue
        seen.add(call)
        bound = {}
        for depth in range(len(scopes) + 1):
            scope = "/".join(scopes[:depth])
            here = config._CONFIG.get((scope, selector), {})
            bound |= {parameter: (scope, value) for parameter, value in here.items()}
        for parameter, (scope, value) in bound.items():
            found.add((scope, selector, parameter))
            todo += [
                (reference.configurable.selector, tuple(reference.scopes) or scopes)
                for reference in config.iterate_references(value)
            ]
        todo += [
            (method, scopes)
            for _, method in config._CONFIG
            if config._REGISTRY[method].is_method and method.rpartition(".")[0] == selector
        ]
        if selector == _BY_NAME:
            todo += [(method, scopes) for method in _named_methods(bound.get("names"))]
    return found


def _configured_from_code(configurable: Any) -> bool:
    """Whether a decorator of gin's made it configurable: code calls it without a reference."""
    from coda_jax.methods import METHODS

    known = configurable.import_source or configurable.module == "gin"
    return not known and configurable.wrapped not in METHODS.values()


def _named_methods(bound: tuple[str, Any] | None) -> list[str]:
    """The selectors of the methods that `configured_methods` makes."""
    from gin import config
    from gin.config import ConfigurableReference as Reference

    from coda_jax.methods import METHODS

    value = bound and bound[1]
    while isinstance(value, Reference):  # a macro
        key = "/".join(value.scopes), value.configurable.selector
        value = config._CONFIG.get(key, {}).get("value")
    names = value if isinstance(value, list | tuple) else ()
    return [config._inverse_lookup(METHODS[name]).selector for name in names if name in METHODS]


def check_rate_of_t5x() -> None:
    """Checks that an OPTIMIZER of optax reads the LEARNING_RATE, which is what T5X logs.

    Raises:
        UsageError: it has a rate of its own. Nothing is checked where gin configures neither.
    """
    with needs():
        from gin import config

    macros = [(name, "gin.macro") for name in ("OPTIMIZER", "LEARNING_RATE")]
    if not all(macro in config._CONFIG for macro in macros):
        return
    if (*macros[1], "value") not in _read_by([("gin.macro", ("OPTIMIZER",))]):
        raise UsageError(
            "OPTIMIZER has a learning rate of its own, and LEARNING_RATE is what T5X logs: give "
            "LEARNING_RATE the schedule, and bind the optimizer's learning_rate = %LEARNING_RATE"
        )


def check_flags_of_t5x() -> None:
    """The same for T5X's programs, which have read their gin files: what was given has an effect.

    Raises:
        UsageError: a macro or a binding of one's own is read by nothing, a name has two values, a
            later file overwrites an earlier one that is to overwrite it, or two recipes or tasks
            are given. Nothing is checked where T5X's flags are not in use.
    """
    with needs():
        from absl import flags
        from gin import config

    if not flags.FLAGS.is_parsed() or "gin_bindings" not in flags.FLAGS:
        return
    files = []
    for name in flags.FLAGS.gin_file:
        with contextlib.suppress(UsageError):  # a file that only T5X can read, as in a bucket
            files.append(read(name, flags.FLAGS.gin_search_paths))
    in_order(files)
    check_order_of_t5x(files)
    members = {member.path: member for file in files for member in file.members()}
    own = [x.bindings for x in members.values() if x.kind is None and not x.installed]
    own.append(read_bindings(flags.FLAGS.gin_bindings))
    for together in own:
        check_values(together)
    given = {binding.name: binding for together in own for binding in together}
    macros = {"/".join(r.scopes) for r in config.iterate_references(config._CONFIG)}
    known = {name: Binding("", name, "", None, "") for name in macros}
    refuse([unread(x, known) for x in given.values() if x.macro and x.macro not in macros])
    keys = {key: x.place for x in given.values() if not x.macro for key in _keys(x)}
    _check_reached(reachable(), keys)


def _keys(binding: Binding) -> list[Key]:
    """The key that gin has for a binding; [] where its file calls a module by a name of its own."""
    from gin import config

    found = config._REGISTRY.matching_selectors(binding.selector)
    return [(binding.scope, found[0], binding.parameter)] if len(found) == 1 else []
