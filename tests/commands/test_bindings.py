"""--gin.NAME=VALUE: what gin can read is read as in a gin file, all else is a text."""

import re

from gin import config_parser
from hypothesis import example, given
from hypothesis import strategies as st
import pytest

from coda_jax.commands import gin_files


class AsWritten(config_parser.ParserDelegate):
    """References and macros, as a gin file writes them."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f"@{scoped_configurable_name}{'()' if evaluate else ''}"

    def macro(self, scoped_name):
        return f"%{scoped_name}"


def statements(line):
    """What gin finds in the line of a gin file."""
    return list(config_parser.ConfigParser(line, AsWritten()))


def bound(text):
    """The value that gin reads for a binding of NAME; nothing else may be bound."""
    (statement,) = statements(gin_files.as_binding(text))
    assert isinstance(statement, config_parser.BindingStatement)
    assert (statement.scope, statement.selector, statement.arg_name) == ("", "NAME", "")
    return statement.value


TEXTS = [
    "",
    " ",
    "my_run",
    "/tmp/x",
    "./x.gin",
    "~/x",
    "gs://b/x",
    "flan-t5-base",
    "3,5",
    "3-5",
    "3d",
    "a=b",
    "1=b",
    "a text with spaces",
    'unbalanced"',
    "it's",
    "1, 2)",
    "50%",
    "%",
    "@",
    "%a b",
    "me@example.org",
    "#hash",
    "a\nb",
    "1\nOTHER=2",
    "1\nimport os",
    "5\\",
    "$HOME",
    "é",
    "\0",
    "true",
    "nan",
    "--gin.NAME=3",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_gin_cannot_read_is_a_text(text):
    assert bound(f"NAME={text}") == text


UNCLOSED = ["'unbalanced", '"""', "(1, 2", "{'inputs: 5}", " {'inputs': 5", "[[1]", "{[1]: 2}"]


@pytest.mark.parametrize("text", UNCLOSED)
def test_what_begins_as_a_value_of_gins_must_be_one(text):
    """A path may begin with a bracket, in quotes."""
    message = f"--gin.NAME={text}: this is no value of gin's. A quote or a bracket may"
    with pytest.raises(gin_files.UsageError, match=re.escape(message)):
        bound(f"NAME={text}")


LITERALS = {
    "1e-3": 1e-3,
    "-1": -1,
    "3": 3,
    "3.0": 3.0,
    "True": True,
    "None": None,
    "%MACRO": "%MACRO",
    "%scope/MACRO": "%scope/MACRO",
    "@fn()": "@fn()",
    "@module.fn": "@module.fn",
    "{'inputs': 5}": {"inputs": 5},
    "{'n': %MACRO, 'm': [@fn()]}": {"n": "%MACRO", "m": ["@fn()"]},
    "(1, 2)": (1, 2),
    "('coda',)": ("coda",),
    "[1, 'a']": [1, "a"],
    "()": (),
    "'quoted'": "quoted",
    '"quoted"': "quoted",
    "'/tmp/x y'": "/tmp/x y",
    "''": "",
    "'a' 'b'": "ab",
    "{'a':\n 5}": {"a": 5},
    " 5 ": 5,
}


@pytest.mark.parametrize("text", LITERALS)
def test_what_gin_can_read_is_what_a_gin_file_says(text):
    value = bound(f"NAME={text}")
    assert value == LITERALS[text] and type(value) is type(LITERALS[text])


@given(st.text())
@example("(" * 5000)
@example("1" * 5000)
@example("'\ud800")
def test_any_value_is_a_literal_or_the_same_text(text):
    """The oracle: what gin says of `NAME = VALUE` as the only line of a gin file."""
    try:
        (statement,) = statements(f"NAME={text}")
        config_parser.ConfigParser(text.strip(), AsWritten()).parse_value()
    except Exception:
        if text.lstrip().startswith(("'", '"', "(", "[", "{")):
            with pytest.raises(gin_files.UsageError):
                bound(f"NAME={text}")
            return
        expected = text
    else:
        expected = statement.value
    assert bound(f"NAME={text}") == expected


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.text() | NUMBERS | st.booleans() | st.none()
VALUES = st.recursive(
    KEYS,
    lambda x: st.lists(x) | st.lists(x).map(tuple) | st.dictionaries(KEYS, x, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_literals_of_python_keep_their_values(value):
    assert bound(f"NAME={value!r}") == value


@given(st.from_regex(r"[A-Za-z_./~][A-Za-z0-9_./:-]*", fullmatch=True))
def test_paths_and_names_are_texts(text):
    assert bound(f"NAME={text}") == {"True": True, "False": False, "None": None}.get(text, text)


@pytest.mark.parametrize("name", ["scope/module.function.argument", "module.function.argument"])
def test_the_name_may_be_a_parameter_with_its_scope(name):
    (statement,) = statements(gin_files.as_binding(f"{name}=my_run"))
    scope, _, path = name.rpartition("/")
    assert (statement.scope, statement.value) == (scope, "my_run")
    assert f"{statement.selector}.{statement.arg_name}" == path
