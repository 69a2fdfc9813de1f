"""A table of a report: cells as text, and its Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .records import Record


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is words, the others figures. ``note`` is a sentence below."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class TableKind:
    """A table's name in markers, its title, and the function that makes it, or None where nothing was measured for it."""

    name: str
    title: str
    make: Callable[[Sequence[Record]], Table | None]


def to_markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (table.head, *table.rows)]
    lines.insert(1, "|" + "|".join(["---"] + ["---:"] * (len(table.head) - 1)) + "|")
    return "\n".join(lines) + "\n" + (f"\n{table.note}\n" if table.note else "")
