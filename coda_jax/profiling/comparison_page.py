"""A comparison as one HTML file that needs no network: table, picture, runs and routed inputs.

`comparison_page.html` has its frame, style and program; without the program, tables, picture,
runs and the first layer of each input are still there.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import json
import pathlib
import re
import string
from typing import Any

from coda_jax.profiling import comparison_points, comparison_table
from coda_jax.profiling.comparison_points import Point
from coda_jax.profiling.comparison_svg import escaped, marker, picture

_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")
_WIDE, _NARROW = (680, 460), (340, 420)  # two pictures, of which a screen shows one
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


def page(report: Mapping[str, Any]) -> str:
    """The HTML of a report. All that it shows is escaped; it refers to nothing outside."""
    recipes = report.get("recipes") or {}
    tables = comparison_table.tables(report)
    routed = [_routed(example) for example in report.get("routed") or ()]
    points = {point.index: point for point in comparison_points.points(report)}
    metric = comparison_table.metric_name(report)
    return string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        task=escaped(str(report.get("task", "one task"))),
        facts="".join(f"<li>{escaped(fact)}</li>" for fact in comparison_table.facts(report)),
        tables="".join(_table(table, list(recipes)) for table in tables),
        wide=picture(report, *_WIDE) if points else "",
        narrow=picture(report, *_NARROW) if points else "",
        note=escaped(" ".join(_notes(recipes, points.values()))),
        runs="".join(
            _run(i, name, recipe, metric, points.get(i))
            for i, (name, recipe) in enumerate(recipes.items())
        ),
        routed="".join(routed) or "<p>No inputs were looked at.</p>",
    )


def _notes(recipes: Iterable[str], points: Collection[Point]) -> Iterator[str]:
    """What the picture shows, and what it does not."""
    if points:
        yield "The line joins the recipes of the Pareto front: no other one is better and faster."
        yield "A point tells its runs and their commands."
    others = set(recipes) - {point.name for point in points}
    if others:
        yield f"Without quality or speed: {', '.join(sorted(others))}."


def _table(table: comparison_table.Table, recipes: Sequence[str]) -> str:
    """A table whose headings are buttons; each cell also has its number as the report has it."""
    headings = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escaped(heading)}</button></th>'
        for heading in ("recipe", *table.headings)
    )
    names = sorted((name for name, _ in table.rows), key=str.casefold)
    rows = []
    for name, cells in table.rows:
        shown = escaped(name)
        if name in recipes:
            index = recipes.index(name)
            symbol = f'<svg class="symbol" viewBox="-8 -8 16 16">{marker(index)}</svg>'
            shown = f'<a class="to-run" href="#run-{index}">{symbol}{shown}</a>'
        numbers = "".join(
            f'<td data-value="{"" if cell.value is None else cell.value}">{escaped(cell.text)}</td>'
            for cell in cells
        )
        place = names.index(name)
        rows.append(f'<tr><th scope="row" data-value="{place}">{shown}</th>{numbers}</tr>')
    title = escaped(table.title)
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{title}"><table>'
        f"<caption>{title}</caption><thead><tr>{headings}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _run(index: int, name: str, recipe: Mapping[str, Any], metric: str, point: Point | None) -> str:
    """Where the runs of a recipe are, and the commands that made them."""
    made = f"{metric} {comparison_table.quality(recipe).text}"
    if recipe.get("methods"):
        made += f"; methods: {', '.join(recipe['methods'])}"
    if point:
        low, high = point.quartiles
        made += f"; encoder {point.speed:.2f}x (quartiles {low:.2f} to {high:.2f})"
    seeds = []
    for i, (seed, cell) in enumerate((recipe.get("cells") or {}).items()):
        score = comparison_table.number(cell, "score")
        title = f"seed {seed}" + (f": {metric} {score:.1f}" if score is not None else "")
        lines = {"folder": "directory", "train": "train", "evaluate": "evaluate", "ood": "ood"}
        given = {what: cell[key] for what, key in lines.items() if cell.get(key)}
        copied = "".join(
            f"<dt>{what} <button type='button' class='copy' hidden>Copy<span class='unseen'> "
            f"{what} of seed {escaped(seed)}</span></button></dt>"
            f"<dd><pre>{_words(str(text))}</pre></dd>"
            for what, text in given.items()
        )
        opened = " open" if i == 0 else ""
        seeds.append(
            f"<details{opened}><summary>{escaped(title)}</summary><dl>{copied}</dl></details>"
        )
    return (
        f'<section class="run" id="run-{index}" aria-label="{escaped(name)}"><h3>'
        f'<svg class="symbol" viewBox="-8 -8 16 16" aria-hidden="true">{marker(index)}</svg>'
        f"{escaped(name)}</h3><p>{escaped(made)}.</p>{''.join(seeds)}</section>"
    )


def _words(text: str) -> str:
    """A text whose lines break between its words, and not after the hyphens of an option."""
    return " ".join(f"<span>{escaped(word)}</span>" for word in text.split(" "))


def _routed(example: Mapping[str, Any]) -> str:
    """An input whose parts are shaded by the weights of one layer, and a slider over the layers."""
    kind = example.get("kind", "text")
    layers = [[_weight(w) for w in layer] for layer in example.get("weights") or [[]]]
    first = layers[0]
    parts = {"text": _pieces, "image": _patches, "sound": _frames}
    if kind not in parts:
        raise ValueError(f"kind of a routed input must be one of {[*parts]}, got {kind!r}")
    title = ": ".join(example[key] for key in ("recipe", "title") if example.get(key))
    weights = escaped(json.dumps(layers, separators=(",", ":")))
    return (
        f'<figure class="routed" data-weights="{weights}"><figcaption>{escaped(title)}</figcaption>'
        f'<p class="layer"><label hidden>layer <input type="range" min="0" value="0" '
        f'max="{len(layers) - 1}"></label> <output>{_taken(0, first)}</output></p>'
        f"{parts[kind](example, first)}</figure>"
    )


def _weight(weight: Any) -> float:
    """A weight with as many digits as can be seen, 0 where it is no number; taken stays taken."""
    return float(f"{comparison_table.number([weight], 0) or 0.0:.3g}")


def _taken(layer: int, weights: Sequence[float]) -> str:
    taken = sum(weight > 0 for weight in weights)
    return f"layer {layer}: {taken} of {len(weights)} taken"


def _cell(weight: float, text: str = "", style: str = "") -> str:
    """One part of an input."""
    kind = "cell taken" if weight > 0 else "cell"
    return f'<span class="{kind}" style="--w:{weight};{style}">{escaped(text)}</span>'


def _cells(count: int, weights: Iterable[float]) -> list[float]:
    """As many weights as there are parts."""
    given = list(weights)[:count]
    return [*given, *[0.0] * (count - len(given))]


def _pieces(example, weights) -> str:
    pieces = example.get("pieces") or []
    shaded = zip(_cells(len(pieces), weights), pieces, strict=True)
    return f'<p class="text">{"".join(_cell(weight, piece) for weight, piece in shaded)}</p>'


def _patches(example, weights) -> str:
    rows, columns = map(int, example.get("grid") or (1, len(weights)))
    cells = "".join(map(_cell, _cells(rows * columns, weights)))
    source = example.get("image", "")
    drawn = f'<img src="{source}" alt="the input">' if _IMAGE.fullmatch(source) else ""
    grid = f"grid-template:repeat({rows},1fr)/repeat({columns},1fr)"
    return f'<div class="image">{drawn}<div class="grid" style="{grid}">{cells}</div></div>'


def _frames(example, weights) -> str:
    energy = [comparison_table.number([e], 0) or 0.0 for e in example.get("energy") or []]
    low, high = min(energy, default=0), max(energy, default=1)
    heights = [(e - low) / ((high - low) or 1) for e in energy]
    shaded = zip(_cells(len(heights), weights), heights, strict=True)
    bars = "".join(_cell(weight, style=f"--e:{height:.3f}") for weight, height in shaded)
    says = 'role="img" aria-label="energy of the frames"'
    return f'<div class="box sound" tabindex="0" {says}>{bars}</div>'
