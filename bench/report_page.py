"""The frame of the report: style sheet, heading and footer."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .report_theme import css_variables

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.02em}
h2{font-size:1.3rem;margin:2.8rem 0 .9rem;padding-top:1.1rem;border-top:1px solid var(--line);letter-spacing:-.01em}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
.lead,.note,figcaption,footer{color:var(--muted)}
.lead{max-width:46rem;margin:0 0 1.2rem}
.note{font-size:.85rem;margin:.5rem 0 0;max-width:60rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem}
figure{margin:0;width:100%;max-width:640px;padding:.9rem .9rem .7rem;display:flex;flex-direction:column;
background:var(--card);border:1px solid var(--line);border-radius:10px;min-width:0}
figure svg{width:100%;height:auto;max-height:46rem;margin:auto 0}
figure text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
figcaption{font-size:.85rem;margin-top:.5rem}
figcaption strong{color:var(--ink)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .55rem;text-align:right;white-space:nowrap;vertical-align:top}
th{font-weight:600;color:var(--muted);background:var(--card);border-bottom:1px solid var(--line);white-space:normal;
vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
tbody tr+tr td{border-top:1px solid var(--line)}
.words td:first-child{white-space:nowrap}
.words th:nth-child(2),.words td:nth-child(2){text-align:left;white-space:normal;min-width:17rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;font-size:.82rem;margin:0}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere;min-width:0}
footer{margin-top:3rem;padding-top:1.1rem;border-top:1px solid var(--line)}
@media(max-width:600px){body{font-size:15px}main{padding:1.3rem .8rem 3rem}h1{font-size:1.5rem}
dl{grid-template-columns:1fr}dt{margin-top:.5rem}figure{padding:.6rem .5rem}th,td{padding:.38rem .5rem}
.words thead,.words tbody td:empty{display:none}.words tr{display:block;padding:.5rem .2rem}.words td{border:0!important}
.words td:first-child{font-weight:600}.words td:nth-child(-n+2){display:block;padding:0 .5rem .25rem}
.words td:nth-child(n+3){display:inline-block;padding:0 .5rem}.words td:nth-child(n+3)::before{color:var(--muted)}
.words td:nth-child(3)::before{content:"GiB "}.words td:nth-child(4)::before{content:"ms "}
.words td:nth-child(5)::before{content:"nDCG@5 "}.words td:nth-child(6)::before{content:"lost "}
.words tbody tr+tr{border-top:1px solid var(--line)}}
@media print{@page{margin:14mm}main{max-width:none;padding:0}body{font-size:10pt}section{break-inside:auto}
figure,tr,h2,h3{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible;border:0}
.plots{grid-template-columns:1fr 1fr}.note,figcaption{font-size:8pt}table{font-size:7pt}
th,td{padding:.2rem .3rem;white-space:normal}
.words th:nth-child(2),.words td:nth-child(2){min-width:0}}
"""


def page(parts: Iterable[str], origin: Sequence[tuple[str, str]], missing: Sequence[str]) -> str:
    """A whole HTML document; it loads nothing and runs no script."""
    variables = (
        f":root{{color-scheme:light dark;{css_variables(dark=False)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{css_variables(dark=True)}}}}}"
    )
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(line)}</dd>" for name, line in origin)
    absent = f"<p>Not measured here: {html.escape(', '.join(missing).lower())}.</p>" if missing else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>metaembed-bench report</title>'
        f"<style>{variables}{STYLE}</style></head><body><main><h1>MetaEmbed, measured</h1>"
        '<p class="lead">Quality, time and memory by budget, R_Q,R_C: how many vectors a query and a candidate use. nDCG@5 is 1 '
        "where the relevant candidates stand first. Every figure comes from a record, whose command is named at the end; what is "
        "arithmetic says so.</p>"
        f"{''.join(parts)}<footer>{absent}<h3>Where this comes from</h3><dl>{lines}</dl></footer></main></body></html>\n"
    )
