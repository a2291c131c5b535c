"""The standard library as a corpus: what is a function of it, and in which split."""

import collections

import pytest

from coda_jax.tasks import stdlib_corpus


def write_library(directory, files):
    for path, text in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    return stdlib_corpus.read_corpus.__wrapped__(str(directory))


def function_text(name, body="x = 1\n", indent=""):
    lines = [f"def {name}(self):", *("    " + body.strip() for _ in range(40))]
    return "".join(indent + line + "\n" for line in lines)


def test_functions_are_found_with_their_decorators_names_and_exceptions(tmp_path):
    method = (
        "    @property\n"
        "    def value(self):\n"
        '        """The value.\n\n        It is long.\n        """\n'
        "        raise errors.Late(1)\n"
        "        raise ValueError\n"
        "        raise error\n" + "        pass\n" * 20
    )
    read = write_library(
        tmp_path,
        {
            "pack/mod.py": '"""Of pack.\n\nMore."""\n\n\nclass K:\n' + method,
            "pack/tests/test_a.py": function_text("test"),
            "pack/test_b.py": function_text("test2"),
            "site-packages/c.py": function_text("third"),
            "broken.py": "def f(:\n",
            "small.py": "def f():\n    pass\n",
        },
    )
    (function,) = read.functions
    assert function.source.startswith('@property\ndef value(self):\n    "')
    assert (function.module, function.file) == ("pack", "pack/mod.py")
    assert (function.qualname, function.name) == ("K.value", "value")
    assert function.docstring == "The value."
    assert function.undocumented.startswith("@property\ndef value(self):\n    raise errors.Late")
    assert function.exceptions == ("Late", "ValueError")
    (file,) = read.files
    assert file.summary == "Of pack."
    assert file.undocumented == file.text.replace('"""Of pack.\n\nMore."""\n', "", 1)
    assert file.classes == ("K",)


def test_duplicates_are_taken_once_and_held_out_everywhere(tmp_path):
    names = [f"name{i}" for i in range(60)]
    plain = "".join(function_text(name) + "\n" for name in names)
    indented = "class C:\n" + "".join(function_text(n, indent="    ") + "\n" for n in names)
    read = write_library(tmp_path, {"a.py": plain, "b.py": indented})
    assert [f.name for f in read.functions] == names
    assert {f.file for f in read.functions} == {"a.py"}
    for function in read.functions:
        for file in read.files:
            assert (f"def {function.name}(" in file.text) == (function.split == "train")


def test_an_empty_library_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_library(tmp_path, {"a.py": "x = 1\n"})


def test_functions_have_the_promised_sizes_and_splits():
    corpus = stdlib_corpus.read_corpus()
    sizes = [len(f.source.encode()) for f in corpus.functions]
    assert min(sizes) >= 200 and max(sizes) <= 2000
    counts = collections.Counter(f.split for f in corpus.functions)
    assert counts["train"] / len(sizes) == pytest.approx(0.8, abs=0.03)
    assert counts["test"] / len(sizes) == pytest.approx(0.1, abs=0.03)
    keys = [stdlib_corpus.normalized(f.source) for f in corpus.functions]
    assert len(set(keys)) == len(keys)  # So the splits are disjoint as well.
    assert not any("test" in f.file.split("/")[:-1] for f in corpus.functions)
