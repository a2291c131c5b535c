"""The page of a comparison, as a parser sees it; a browser does in test_comparison_browser."""

import copy
from html.parser import HTMLParser
import json
import re

from comparison_reports import HOSTILE, RECIPES, STEPS, hostile, report, sparse
import pytest

from coda_jax.profiling.comparison_page import page
from coda_jax.profiling.comparison_points import front, points
from coda_jax.profiling.comparison_table import tables

VOID = {"meta", "img", "input", "br", "circle", "path"}


class Element:
    """A tag with its attributes, texts and elements."""

    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent, self.inner = tag, attributes, parent, []

    @property
    def text(self):
        return "".join(x if isinstance(x, str) else x.text for x in self.inner)

    def all(self, tag=None, **attributes):
        """The elements within that have a tag and attributes, in the order of the page."""
        found = []
        for child in (x for x in self.inner if isinstance(x, Element)):
            wanted = {k.strip("_"): v for k, v in attributes.items()}
            if tag in (None, child.tag) and wanted.items() <= child.attributes.items():
                found.append(child)
            found += child.all(tag, **attributes)
        return found


class Parser(HTMLParser):
    """Builds elements; a tag that is closed by another's end is an error."""

    def __init__(self, html):
        super().__init__()
        self.root = self.here = Element("", {})
        self.feed(html)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {attrs}"
        element = Element(tag, dict(attrs), self.here)
        self.here.inner.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        self.here.inner.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> ends <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.inner.append(data)


@pytest.fixture(scope="module", name="root")
def fixture_root():
    return Parser(page(report())).root


def test_tables_have_the_numbers_of_the_report(root):
    for element, table in zip(root.all("table"), tables(report()), strict=True):
        assert [b.text for b in element.all("button")] == ["recipe", *table.headings]
        assert {th.attributes["aria-sort"] for th in element.all("th", scope="col")} == {"none"}
        rows = element.all("tbody")[0].all("tr")
        for row, (name, cells) in zip(rows, table.rows, strict=True):
            assert row.all("th", scope="row")[0].text == name
            for td, cell in zip(row.all("td"), cells, strict=True):
                assert td.text == cell.text
                value = td.attributes["data-value"]
                assert (float(value) if value else None) == cell.value


def test_both_pictures_have_a_link_for_each_point_and_the_front(root):
    found = report()
    best = front(points(found), "max")
    for picture in root.all("svg", role="group"):
        links = picture.all("a", class_="to-run")
        assert [a.attributes["href"] for a in links] == [f"#run-{i}" for i in range(len(RECIPES))]
        for link, name in zip(links, RECIPES, strict=True):
            assert link.all("text")[0].text == name
            mean, error, speed = RECIPES[name][1:]
            says = f"{name}: accuracy {mean:.1f} ± {error:.1f}, encoder {speed:.2f}x"
            assert link.attributes["aria-label"] == says
        (line,) = picture.all("path", class_="front")
        assert len(re.findall("[ML]", line.attributes["d"])) == len(best) > 2
    assert len(root.all("svg", role="group")) == 2


def test_runs_have_folders_and_commands(root):
    sections = root.all("section", class_="run")
    for i, (section, recipe) in enumerate(zip(sections, report()["recipes"].values(), strict=True)):
        assert section.attributes["id"] == f"run-{i}"
        expected = [
            cell[key]
            for cell in recipe["cells"].values()
            for key in ("directory", "train", "evaluate")
        ]
        assert [pre.text for pre in section.all("pre")] == expected


def test_routed_inputs_have_their_parts_and_weights(root):
    for figure, example in zip(root.all("figure"), report()["routed"], strict=True):
        layers = json.loads(figure.attributes["data-weights"])
        expected = [[float(f"{w:.3g}") for w in layer] for layer in example["weights"]]
        assert layers == expected
        cells = [c for c in figure.all("span") if "cell" in c.attributes["class"]]
        taken = ["taken" in cell.attributes["class"] for cell in cells]
        assert taken == [w > 0 for w in expected[0]]  # without the program, the first layer
        assert figure.all("input")[0].attributes["max"] == str(len(layers) - 1)
        if example["kind"] == "text":
            assert [cell.text for cell in cells] == example["pieces"]
        if example["kind"] == "image":
            assert figure.all("img")[0].attributes["src"] == example["image"]


def test_every_id_is_one_elements_and_every_link_leads_to_one(root):
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = [e.attributes["href"] for e in root.all() if "href" in e.attributes]
    assert {link.removeprefix("#") for link in links} <= set(ids)


@pytest.mark.parametrize("make", [report, hostile, sparse])
def test_nothing_is_fetched_from_outside(make):
    text = page(make())
    assert not re.search(r"(?i)https?:|//\w+\.|url\(|@import|\bfetch\(|XMLHttp", text)
    root = Parser(text).root
    assert not {"link", "iframe", "object", "embed", "base"} & {e.tag for e in root.all()}
    for element in root.all():
        for name in ("src", "href"):
            assert element.attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in element.attributes if name.startswith("on")]


def test_texts_of_a_report_are_texts_of_the_page():
    """A name or a token is neither program nor markup; the page has the tags of any other."""
    root, harmless = Parser(page(hostile())).root, Parser(page(report())).root
    (script,), (own,) = root.all("script"), harmless.all("script")
    assert script.text == own.text
    skipped = ("img", "li")  # no image is shown, as its address is none; fewer facts
    tags = [[e.tag for e in r.all() if e.tag not in skipped] for r in (root, harmless)]
    assert sorted(set(tags[0])) == sorted(set(tags[1]))
    assert not root.all("img")
    cells = root.all("p", class_="text")[0].all("span")
    assert {cell.text for cell in cells} == {HOSTILE}
    assert root.all("section")[0].all("pre")[0].text == HOSTILE
    assert root.all("title")[0].text == f"Methods side by side: {HOSTILE}"


def test_a_page_is_written_in_utf_8_whatever_a_token_is():
    found = report()
    found["routed"][0]["pieces"][0] = "\ud800"
    found["recipes"]["\ud800"] = {"mean": 1.0}
    page(found).encode("utf-8")


def test_what_is_missing_is_a_dash_or_left_out():
    root = Parser(page(sparse())).root
    cells = {tr.all("th")[0].text: tr.all("td")[0] for tr in root.all("tbody")[0].all("tr")}
    assert cells["one"].text == "50.0" and cells["two"].text == "–"  # noqa: RUF001
    assert cells["two"].attributes["data-value"] == ""
    assert "NaN" not in page(sparse()) and "None" not in root.text
    assert "Without quality or speed: one, two." in root.text
    assert not root.all("svg", role="group")
    Parser(page({}))


@pytest.mark.parametrize(
    "key", ["checkpoints", "timed", "dense", "baselines", "routed", "versions"]
)
def test_every_part_of_a_report_may_be_missing(key):
    found = report()
    del found[key]
    Parser(page(found))
    assert f"{STEPS:,} steps" in page(found)


@pytest.mark.parametrize("key", ["methods", "trained", "total", "error", "cells", "speed", "tpu"])
def test_every_part_of_a_recipe_may_be_missing(key):
    found = report()
    del found["recipes"]["LoRA"][key]
    Parser(page(found))


def test_weights_that_do_not_fit_are_not_taken():
    found = report()
    text = copy.deepcopy(found["routed"][0])
    text["weights"] = [[float("nan"), 1e-6]]
    root = Parser(page(found | {"routed": [text]})).root
    cells = root.all("p", class_="text")[0].all("span")
    assert [c.attributes["class"] for c in cells[:3]] == ["cell", "cell taken", "cell"]
    assert json.loads(root.all("figure")[0].attributes["data-weights"]) == [[0.0, 1e-6]]


def test_a_kind_of_input_that_is_unknown_is_named():
    with pytest.raises(ValueError, match=r"must be one of .*'text'.*, got 'video'"):
        page({"routed": [{"kind": "video", "weights": [[1.0]]}]})
