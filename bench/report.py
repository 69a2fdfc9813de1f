"""All records of a folder as one HTML page that needs nothing else: plots inline, light and dark, for screens and paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from metaembed.runtime.staged_file import staged_file

from .records import Record
from .report_advice import CANDIDATES, LATENCY_MS, make_advice
from .report_page import page
from .report_plots import PLOTS, Plot
from .report_tables import TABLES
from .report_theme import save_png, save_svg, themed, to_svg
from .table import Table

# The page, top to bottom: a heading, and the plots and tables below it. What was not measured is left out.
SECTIONS = (
    ("Quality", ("quality",), ("demo_quality",)),
    ("The paper's claims, tested again", ("claims", "tradeoff"), ("claims", "verdicts")),
    (
        "Scoring and the index",
        ("latency", "scaling", "memory", "roofline"),
        ("targets", "scoring", "int8", "scaling", "cascades", "approximate", "efficiency"),
    ),
    ("Encoding", ("encoder",), ("encoder_race", "encoder_costs")),
    ("On a GPU", ("gpu_encoder",), ("gpu_race", "gpu_latency", "gpu_scoring")),
    ("Parity and quantisation", ("parity", "sensitivity"), ("calibration",)),
    ("Exporting and building", (), ("exports", "export_parity", "engine_layouts")),
)


def write_report(records: Sequence[Record], folder: Path) -> Path:
    """Write report.html and plots/*.png into the folder; returns the page's path."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    with themed():
        figures = {plot.name: render_plot(plot, records, folder) for plot in PLOTS}
    parts = [_advice(records)]
    for title, plots, tables in SECTIONS:
        inside = [figures[name] for name in plots] + [_known_table(name, records) for name in tables]
        parts.append(_section(title, inside))
    target = folder / "report.html"
    with staged_file(target.resolve()) as part:
        part.write_text(page(parts, describe_origin(records), missing(figures)), encoding="utf-8")
    return target


def render_plot(plot: Plot, records: Sequence[Record], folder: Path) -> str:
    """The plot as a figure element, and as plots/NAME.png and .svg; an empty text where nothing was measured for it."""
    figure = plot.draw(records)
    if figure is None:
        return ""
    save_png(figure, folder / "plots" / f"{plot.name}.png")
    save_svg(figure, plot.name, folder / "plots" / f"{plot.name}.svg")
    caption = f"<strong>{html.escape(plot.title)}.</strong> {html.escape(plot.caption)}"
    return (
        f'<figure id="plot-{plot.name}" role="img" aria-label="{html.escape(plot.title)}">'
        f"{to_svg(figure, plot.name)}<figcaption>{caption}</figcaption></figure>"
    )


def render_table(title: str, table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{html.escape(title)}</h3><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def describe_origin(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Where the records come from: machines, tools, artefacts and commands, each named once."""
    machines = dict.fromkeys(_machine(record) for record in records if record.get("machine"))
    versions = dict.fromkeys(f"{tool} {v}" for record in records for tool, v in (record.get("versions") or {}).items())
    artefacts = dict.fromkeys(
        f"{record['artefact']} (sha256 {record['sha256'][:12]})" for record in records if record.get("artefact")
    )
    commands = dict.fromkeys(record["command"] for record in records if record.get("command"))
    days = sorted(record["at"][:10] for record in records if record.get("at"))
    when = "" if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    found = (
        ("measured", [when]),
        ("machine", machines),
        ("tools", [", ".join(versions)]),
        ("artefacts", artefacts),
        ("commands", commands),
    )
    return [(name, line) for name, lines in found for line in lines if line]


def missing(figures: dict[str, str]) -> list[str]:
    """Titles of the plots that had no records."""
    return [plot.title for plot in PLOTS if not figures[plot.name]]


def _machine(record: Record) -> str:
    machine = record["machine"]
    gpu = machine.get("gpu") or "no GPU"
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, {gpu}"


def _advice(records: Sequence[Record]) -> str:
    table = make_advice(records)
    title = f"Which budget? For {CANDIDATES:,} candidates at {LATENCY_MS:g} ms a query"
    return "" if table is None else f'<section class="words">{render_table(title, table)}</section>'


def _known_table(name: str, records: Sequence[Record]) -> str:
    kind = TABLES[name]
    table = kind.make(records)
    return "" if table is None else render_table(kind.title, table)


def _section(title: str, inside: Iterable[str]) -> str:
    parts = [part for part in inside if part]
    figures = "".join(part for part in parts if part.startswith("<figure"))
    tables = "".join(part for part in parts if not part.startswith("<figure"))
    grid = f'<div class="plots">{figures}</div>' if figures else ""
    return f"<section><h2>{html.escape(title)}</h2>{grid}{tables}</section>" if parts else ""
