"""The documents: their examples run, their links and paths exist."""

import pathlib
import re

import jax
import optax
import pytest

import coda_jax
from coda_jax import bundled, trees

ROOT = pathlib.Path(__file__).parents[1]
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def examples(path: pathlib.Path) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.all
def test_examples_of_extending_run(tmp_path, monkeypatch):
    """A method and a family that are made in the text behave as registered ones do."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    added = [(coda_jax.METHODS, "ia3"), (coda_jax.FAMILIES, "my_t5")]
    method, use, family, use_family = examples(ROOT / "docs/extending.md")
    try:
        exec(method + use, names)
        config, params = names["config"], names["params"]
        paths = trees.flatten(names["trained"])
        assert sum(path.endswith("ia3_factor") for path in paths) == 4 * 4 + 2 * 6
        tokens = jax.random.randint(jax.random.key(2), (2, 12), 2, config.vocab_size)
        scaled = {p: x * 1.5 if "ia3" in p else x for p, x in trees.flatten(params).items()}
        params = trees.unflatten(scaled)
        merged_config, merged = coda_jax.merge(config, params)
        found = jax.jit(coda_jax.model_for(merged_config).encode)(merged, tokens)
        expected = jax.jit(coda_jax.model_for(config).encode)(params, tokens)
        assert [m.name for m in merged_config.methods] == ["coda"]
        assert abs(found - expected).max() < 1e-4
        exec(family + use_family, names)
        assert names["config"].family == "my_t5"
        coda_jax.save_adapter(
            "adapter",
            adapted := names["config"].replace(methods=(coda_jax.ParallelAdapter(4),)),
            coda_jax.swap_in(adapted, names["params"], jax.random.key(0)),
        )
        loaded, _ = coda_jax.load_adapter("adapter", names["config"], names["params"])
        assert loaded.methods == adapted.methods
    finally:
        for table, name in added:
            table.pop(name, None)


def test_the_readme_is_short_and_its_python_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    (code,) = examples(ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("flan-t5-base", str(bundled.DENSE)), names)
    logits = names["model"].logits(names["params"], names["batch"])
    targets, weights = (names["batch"][f"decoder_{x}"] for x in ("target_tokens", "loss_weights"))
    chosen = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    assert names["loss"] == pytest.approx(float((chosen * weights).sum()), rel=1e-5)
    assert names["tokens"].shape == (1, 16)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Every relative link of a document is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_paths_of_the_tour_exist():
    """Files and functions that docs/method.md names in its tour are there."""
    text = (ROOT / "docs/method.md").read_text()
    tour = text[text.index("## A tour") : text.index("## Glossary")]
    for line in tour.splitlines():
        cells = re.findall(r"`([\w/.]+)`", line.rpartition("| ")[2] if line.startswith("|") else "")
        files = [cell for cell in cells if "/" in cell]
        for file in files:
            assert any((base / file).exists() for base in (ROOT, ROOT / "coda_jax")), file
        for name in (cell for cell in cells if "/" not in cell and not cell.endswith(".py")):
            sources = [(ROOT / "coda_jax" / f).read_text() for f in files if f.endswith(".py")]
            kinds = ("def", "class")
            last = name.split(".")[-1]
            assert any(f"{kind} {last}" in source for source in sources for kind in kinds), name
