"""One look for all plots: drawn once with the light palette, which SVG output turns into CSS variables for light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# CSS variable -> (light, dark). Series colours keep 3:1 against both papers and differ in lightness, for colour-blind eyes.
PALETTE = {
    "paper": ("#ffffff", "#15181d"),
    "card": ("#f6f7f9", "#1c2027"),
    "ink": ("#1b1f27", "#e7e9ed"),
    "muted": ("#59616d", "#a0a8b4"),
    "line": ("#dfe3e8", "#323943"),
    "s1": ("#1f5fbf", "#78b0ff"),
    "s2": ("#d2571e", "#ff9d66"),
    "s3": ("#15806a", "#4fd3b3"),
    "s4": ("#8646c0", "#cb9bf0"),
    "s5": ("#96700f", "#e3b952"),
    "s6": ("#7a8290", "#8b94a3"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
SERIES = [LIGHT[f"s{k}"] for k in range(1, 7)]
MARKERS = ["o", "s", "D", "^", "v", "P"]  # a second sign beside the colour
WIDTH, HEIGHT = 5.4, 3.7  # inches: small, so that text stays readable when a phone shrinks the plot
PNG_DPI = 160

STYLE: dict[str, Any] = {
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": LIGHT["muted"],
    "axes.prop_cycle": matplotlib.cycler(color=SERIES, marker=MARKERS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "figure.figsize": (WIDTH, HEIGHT),
    "font.size": 10,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
    "lines.linewidth": 2,
    "lines.markersize": 5.5,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
}


@contextmanager
def themed() -> Iterator[None]:
    """Figures made inside have the look, and are closed when it ends."""
    with plt.rc_context(STYLE):
        try:
            yield
        finally:
            plt.close("all")


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page that defines the palette's variables; ids start with ``name``."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for variable, colour in LIGHT.items():
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" ',
        r"<svg \1",
        re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", svg, count=1),
        count=1,
    )


def save_png(figure: Figure, path: Path) -> None:
    """The light picture on white, for places that take no SVG."""
    figure.savefig(path, dpi=PNG_DPI, facecolor=LIGHT["paper"], transparent=False)


def save_svg(figure: Figure, name: str, path: Path) -> None:
    """A picture of its own that is light or dark as its viewer is."""
    style = f"<style>svg {{ {css_variables(False)} }} @media (prefers-color-scheme: dark) {{ svg {{ {css_variables(True)} }} }}"
    style += " text { font-family: system-ui, sans-serif; }</style>"
    element = to_svg(figure, name)
    end = element.index(">") + 1
    path.write_text(f"{element[:end]}{style}{element[end:]}", encoding="utf-8")


def css_variables(dark: bool) -> str:
    return " ".join(f"--{name}: {colours[dark]};" for name, colours in PALETTE.items())
