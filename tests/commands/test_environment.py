"""What is set up before anything is imported: where programs are kept, and what is printed."""

import importlib.util
import os
import subprocess
import sys
import threading

import pytest

from coda_jax.commands import environment


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The user's cache folder, and variables that are put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("DIR", "MIN"):
        monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", "")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    yield tmp_path / "coda_jax" / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")


def test_programs_are_kept_in_the_users_cache_folder(cache):
    assert environment.keep_programs(True) == f"compiled programs are kept in {cache}"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(cache) and cache.is_dir()


def test_jaxs_own_variable_goes_before(cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert environment.keep_programs(True) == "compiled programs are kept in /elsewhere"
    assert not cache.exists()


def test_nothing_is_kept_where_that_is_asked_for(cache):
    assert environment.keep_programs(False) == "compiled programs are not kept"
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false" and not cache.exists()


def test_a_folder_that_cannot_be_written_is_left_alone(cache):
    cache.parent.write_text("a file in its place")
    assert environment.keep_programs(True).startswith("compiled programs are not kept: ")
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_without_a_home_folder_nothing_is_kept(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environment.programs_folder() is None
    assert environment.keep_programs(True).endswith("there is no home folder")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "given")
    assert environment.programs_folder() == "given"


def test_tensorflow_is_quiet_also_where_it_was_looked_for_before(monkeypatch):
    finder = environment._QuietTensorFlow()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    for _ in range(2):
        importlib.util.find_spec("tensorflow")
        assert sys.meta_path[0] is finder


def test_the_oldest_programs_are_removed_where_they_are_too_many(cache, monkeypatch):
    """Also by several processes at once."""
    cache.mkdir(parents=True)
    monkeypatch.setattr(environment, "MAX_CACHE_BYTES", 300)
    for age in range(40):
        (cache / f"{age:02}").write_bytes(b"x" * 100)
        os.utime(cache / f"{age:02}", (1e9 - age, 1e9 - age))
    threads = [threading.Thread(target=environment.keep_programs, args=[True]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = sorted(path.name for path in cache.iterdir())
    assert left == [f"{age:02}" for age in range(len(left))] and 0 < len(left) <= 3


def test_early_logs_are_left_out_and_all_else_is_not(capfd):
    with environment.without_early_logs():
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are\n")
        os.write(2, b"I0000 00:00:1795673546.784293   19665 cudart_stub.cc:31] no cuda\n")
        print("what the user must see", file=sys.stderr)
    with pytest.raises(ImportError), environment.without_early_logs():
        os.write(2, b"why it fails\n")
        raise ImportError
    assert capfd.readouterr().err == "what the user must see\nwhy it fails\n"


def test_only_what_this_package_says_is_printed():
    code = """
import logging, pathlib, sys, warnings
from coda_jax.commands import environment
environment.quiet("predict", verbose=False)
from absl import logging as absl_logging
absl_logging.warning("of another")
logging.getLogger("jax").error("of another")
warnings.warn("of another")
source = compile("absl_logging.warning('3 inputs were cut')", environment.__file__, "exec")
exec(source)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "coda predict: 3 inputs were cut\n")


def test_verbose_prints_what_is_logged():
    code = """
import logging
from coda_jax.commands import environment
environment.quiet("predict", verbose=True)
logging.getLogger("some.library").info("of another")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "some.library: of another\n")
