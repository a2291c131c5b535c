"""A comparison as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from coda_jax.profiling.comparison_table import facts, tables


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, with what the numbers are."""
    lines = [_plain(" ".join(facts(report)))]
    for table in tables(report):
        lines += ["", f"{table.title}:", "", _row("", table.headings)]
        lines.append("|---|" + "---:|" * len(table.headings))
        lines += [_row(name, (cell.text for cell in cells)) for name, cells in table.rows]
    return "\n".join(lines) + "\n"


def _row(name: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_plain, (name, *cells))) + " |"


def _plain(text: str) -> str:
    """A text that stays in its line and its cell."""
    return " ".join(text.split()).replace("|", "\\|")
