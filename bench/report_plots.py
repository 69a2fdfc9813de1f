"""The report's plots. Each takes all records and returns a figure, or None where nothing was measured for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from metaembed.runtime.memory import GIB
from metaembed.runtime.parity import TOLERANCES

from .records import Record, group, of_kind
from .report_theme import LIGHT, MARKERS, SERIES

MILLION = 1_000_000
DASHED = {"linestyle": (0, (4, 3)), "linewidth": 1.4, "marker": ""}
MOST_BARS = 16


@dataclass(frozen=True)
class Plot:
    """A figure's file name, its title, what it shows in a sentence, and the function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Sequence[Record]], Figure | None]


def draw_quality(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "quality", "dataset", "artefact", "budget", "cascade")
    if not found:
        return None
    figure, axes = plt.subplots()
    plain = [record for record in found if not record["cascade"]]
    for k, (name, curve) in enumerate(group(plain, "dataset", "artefact").items()):
        _curve_with_interval(axes, curve, ", ".join(name), k)
    cascades = [record for record in found if record["cascade"]]
    for place, record in enumerate(cascades):  # labels in a column: most cascades end at the same point
        axes.plot(record["budget"], record["ndcg_at_5"], "*", color=LIGHT["s2"], markersize=11, zorder=3)
        text = f"cascade {record['cascade']}: {record['ndcg_at_5']:.3f}"
        axes.annotate(text, (1, 0), xytext=(-6, 6 + 12 * (len(cascades) - 1 - place)), xycoords="axes fraction",
                      textcoords="offset points", ha="right", fontsize=8, color=LIGHT["s2"])  # fmt: skip
    return _finish(figure, axes, "budget (query, candidate vectors)", "nDCG@5")


def draw_budgets(records: Sequence[Record]) -> Figure | None:
    """Three panels side by side, of one model: what a budget gives, and what it takes."""
    quality = [r for r in of_kind(records, "quality", "dataset", "artefact", "budget", "cascade") if not r["cascade"]]
    scoring = of_kind(records, "scoring", "model", "budget")
    scoring = [record for record in scoring if quality and quality[0]["artefact"].startswith(record["model"])]
    if not scoring:
        return None
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.7))
    count = f"{scoring[0]['scaled_to']:,} candidates"
    _labelled_curve(panels[0], quality, "ndcg_at_5", "nDCG@5", "{:.3f}")
    _labelled_curve(panels[1], scoring, "scaled_ms", f"scoring {count}, ms a query", "{:,.1f}")
    _labelled_curve(panels[2], quality, "index_kib_per_item", "index, KiB an item (bf16)", "{:,g}")
    for axes in panels[1:]:
        axes.set_yscale("log")
        _log_axis(axes.yaxis)
    return figure


def draw_claims(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "claim_point", "system", "budget")
    if not found:
        return None
    figure, axes = plt.subplots()
    for k, ((name,), curve) in enumerate(group(found, "system").items()):
        if curve[0]["budget"] == "all tokens":
            axes.axhline(curve[0]["ndcg_at_5"], color=SERIES[k], label=f"{name} (untrained)", **DASHED)
        else:
            label = name if curve[0]["trained"] else f"{name} (untrained)"
            _curve_with_interval(axes, curve, label, k)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "budget (query, candidate vectors)", "nDCG@5")


def draw_tradeoff(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "claim_point", "system", "budget")
    if not found:
        return None
    figure, axes = plt.subplots()
    for k, ((name,), curve) in enumerate(group(found, "system").items()):
        axes.plot([r["index_kib_per_item"] for r in curve], [r["ndcg_at_5"] for r in curve], label=name,
                  color=SERIES[k], marker=MARKERS[k])  # fmt: skip
    axes.set_xscale("log")
    _log_axis(axes.xaxis)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "index size per item, KiB (bf16)", "nDCG@5")


def draw_latency(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "scoring", "model", "budget")
    if not found:
        return None
    figure, axes = plt.subplots()
    for k, ((name,), curve) in enumerate(group(found, "model").items()):
        scale = [record["scaled_ms"] / record["median_ms"] for record in curve]
        budgets = [record["budget"] for record in curve]
        axes.plot(budgets, [r["scaled_ms"] for r in curve], label=name, color=SERIES[k], marker=MARKERS[k])
        limits = [record["limit_ms"] * factor for record, factor in zip(curve, scale, strict=True)]
        axes.plot(budgets, limits, color=SERIES[k], label=f"{name}, this machine's limit", **DASHED)
    axes.set_yscale("log")
    _log_axis(axes.yaxis)
    return _finish(figure, axes, "budget", f"ms a query, {found[0]['scaled_to']:,} candidates")


def draw_memory(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "scoring_cost", "model", "budget")
    if not found:
        return None
    figure, axes = plt.subplots()
    for k, ((name,), curve) in enumerate(group(found, "model").items()):
        sizes = [record["index_gib"] * MILLION / record["candidates"] for record in curve]
        axes.plot([record["budget"] for record in curve], sizes, label=name, color=SERIES[k], marker=MARKERS[k])
    axes.set_yscale("log")
    _log_axis(axes.yaxis)
    for gib, what in ((64, "AGX Orin 64 GB"), (80, "A100, H100 80 GB")):
        axes.axhline(gib, color=LIGHT["muted"], linestyle=":", linewidth=1, marker="")
        axes.annotate(what, (0, gib), xytext=(0, -10 if gib == 64 else 3), textcoords="offset points", fontsize=8,
                      color=LIGHT["muted"])  # fmt: skip
    return _finish(figure, axes, "budget", "index of a million candidates, GiB (bf16)")


def draw_roofline(records: Sequence[Record]) -> Figure | None:
    machines, found = of_kind(records, "machine_limits"), of_kind(records, "scoring", "model", "budget")
    if not machines or not found:
        return None
    peak, bandwidth = machines[-1]["gflops"], machines[-1]["read_gb_s"]
    figure, axes = plt.subplots()
    x = np.geomspace(0.5, 32, 100)
    axes.plot(
        x, np.minimum(peak, x * bandwidth), color=LIGHT["muted"], marker="", label="limit: sgemm rate, memory reads"
    )
    for k, ((name,), curve) in enumerate(group(found, "model").items()):
        intensity = [record["gflop"] / (record["index_gib"] * GIB / 1e9) for record in curve]
        rate = [record["gflop"] / record["median_ms"] * 1e3 for record in curve]
        axes.plot(intensity, rate, linestyle="", color=SERIES[k], marker=MARKERS[k], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    return _finish(figure, axes, "operations per byte of index (= query vectors)", "GFLOP/s")


def draw_scaling(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "scoring_scaling", "budget", "candidates")
    if not found:
        return None
    figure, axes = plt.subplots()
    for k, ((budget,), curve) in enumerate(group(found, "budget").items()):
        counts, times = [r["candidates"] for r in curve], [r["median_ms"] for r in curve]
        axes.plot(counts, times, label=budget, color=SERIES[k % len(SERIES)], marker=MARKERS[k % len(MARKERS)])
        linear = [times[-1] * count / counts[-1] for count in counts]
        axes.plot(counts, linear, color=LIGHT["muted"], label="" if k else "in proportion to the last", **DASHED)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    return _finish(figure, axes, f"candidates of {found[0]['dim']} dims", "ms a query")


def draw_encoder(records: Sequence[Record]) -> Figure | None:
    return _draw_race(of_kind(records, "encoder", "model", "input", "contestant"), "model")


def draw_gpu_encoder(records: Sequence[Record]) -> Figure | None:
    return _draw_race(of_kind(records, "encoder_gpu", "model", "opset", "input", "contestant"), "model", "opset")


def _draw_race(records: Sequence[Record], *panels: str) -> Figure | None:
    """A panel for each value of these fields, one below the other: side by side they would be too small to read."""
    found = [record for record in records if "error" not in record]
    models = group(found, *panels)
    if not models:
        return None
    contestants = list(dict.fromkeys(record["contestant"] for record in found))
    rows = [len(group(runs, "input")) for runs in models.values()]
    size = (6.2, 0.6 + 0.9 * len(models) + 0.45 * sum(rows))
    figure, axes = plt.subplots(len(models), figsize=size, squeeze=False, height_ratios=[0.4 + count for count in rows])
    for ax, ((model, *opset), runs) in zip(axes[:, 0], models.items(), strict=True):
        _race_panel(ax, runs, contestants)
        ax.set_title(", opset ".join((model, *opset)), fontsize=10, color=LIGHT["muted"])
    axes[-1, 0].set_xlabel("ms, with a line to p95")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _race_panel(axes: Axes, runs: Sequence[Record], contestants: Sequence[str]) -> None:
    """A row an input; within it each contestant's mark at a height of its own."""
    quickest = {name: min(run["median_ms"] for run in own) for (name,), own in group(runs, "input").items()}
    inputs = sorted(quickest, key=lambda name: quickest[name])
    for k, contestant in enumerate(contestants):
        own = [run for run in runs if run["contestant"] == contestant]
        places = [
            -(inputs.index(run["input"]) + (k - (len(contestants) - 1) / 2) * 0.7 / len(contestants)) for run in own
        ]
        medians, colour = [run["median_ms"] for run in own], SERIES[k % len(SERIES)]
        axes.hlines(places, medians, [run["p95_ms"] for run in own], color=colour, linewidth=1.5, alpha=0.6)
        axes.plot(medians, places, linestyle="", color=colour, marker=MARKERS[k % len(MARKERS)], label=contestant)
    axes.set_yticks([-row for row in range(len(inputs))], inputs)
    axes.set_ylim(0.5 - len(inputs), 0.5)
    axes.set_xscale("log")
    _log_axis(axes.xaxis)
    axes.grid(axis="y", visible=False)


def draw_parity(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "parity", "model", "precision", "side", "image_tokens")
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(5.4, 4.7))
    subjects = list(group(found, "model", "precision"))
    for (*subject, side), curve in group(found, "model", "precision", "side").items():
        curve, k = sorted(curve, key=lambda r: r["image_tokens"]), subjects.index(tuple(subject)) % len(SERIES)
        axes.plot([r["image_tokens"] for r in curve], [max(1 - r["min_cosine"], 1e-8) for r in curve],
                  label=", ".join((*subject, side)), color=SERIES[k], marker=MARKERS[k],
                  fillstyle="full" if side == "query" else "none")  # fmt: skip
    tolerances: dict[float, list[str]] = {}
    for precision in dict.fromkeys(record["precision"] for record in found):
        tolerances.setdefault(1 - TOLERANCES[precision].cosine, []).append(precision)
    for tolerance, precisions in tolerances.items():
        axes.axhline(tolerance, color=LIGHT["muted"], **DASHED)
        axes.annotate(f"tolerance, {' and '.join(precisions)}", (1, tolerance), xytext=(0, -10), ha="right", fontsize=8,
                      xycoords=("axes fraction", "data"), textcoords="offset points", color=LIGHT["muted"])  # fmt: skip
    axes.set_xscale("symlog", linthresh=4)
    axes.set_xlim(left=-0.5)
    axes.set_yscale("log")
    _log_axis(axes.xaxis)
    return _finish(figure, axes, "visual tokens of the input (0: text)", "1 - worst cosine to HF fp32")


def draw_sensitivity(records: Sequence[Record]) -> Figure | None:
    found = of_kind(records, "sensitivity", "model", "precision", "group")
    if not found:
        return None
    worst = {name: max(record["cost"] for record in costs) for (name,), costs in group(found, "group").items()}
    names = sorted(worst, key=lambda name: worst[name])[-MOST_BARS:]
    figure, axes = plt.subplots(figsize=(5.4, 1.2 + 0.2 * len(names)))
    for k, ((precision,), costs) in enumerate(group(found, "precision").items()):
        at = {record["group"]: record for record in costs if record["group"] in names}
        style = {"color": SERIES[k], "markersize": 6}
        for kept, label, fill in ((False, precision, "full"), (True, f"{precision}, kept high", "none")):
            shown = [name for name in names if name in at and at[name]["quantised"] != kept]
            if shown:
                costs_shown = [at[name]["cost"] for name in shown]
                axes.plot(costs_shown, [names.index(name) for name in shown], "o", label=label, fillstyle=fill, **style)
    axes.set_yticks(
        range(len(names)), [name.replace("language_model.", "").replace("_proj", "") for name in names], fontsize=7
    )
    axes.set_xscale("log")
    return _finish(figure, axes, "1 - worst cosine when this group alone is quantised", "")


PLOTS = (
    Plot("budgets", "What a budget gives and takes", "One model, in one row: for slides and a README.", draw_budgets),
    Plot("quality", "Quality by budget", "nDCG@5 with 95 % bootstrap intervals over the queries.", draw_quality),
    Plot("claims", "The paper's claims, on the demo", "The same queries for all systems; bands are 95 % intervals.", draw_claims),
    Plot("tradeoff", "What a kilobyte buys", "Each mark is a budget; further left is a smaller index.", draw_tradeoff),
    Plot("latency", "Scoring time by budget", "Medians on this machine (solid) and what it could do at best (dashed); larger "
         "indexes than were held in memory are scaled.", draw_latency),
    Plot("memory", "Index size by budget", "By arithmetic: vectors x dims x 2 bytes.", draw_memory),
    Plot("roofline", "Roofline of scoring", "How close scoring comes to what this machine's arithmetic and memory allow.",
         draw_roofline),
    Plot("scaling", "Scoring time by candidates", "One query; budgets as named.", draw_scaling),
    Plot("encoder", "Encoding one input", "Contestants took turns on the same inputs, each in a process of its own.",
         draw_encoder),
    Plot("gpu_encoder", "Encoding one input on a GPU", "As above, on one GPU.", draw_gpu_encoder),
    Plot("parity", "Parity by image size", "The bundle's golden inputs replayed here, against Hugging Face in float32.",
         draw_parity),
    Plot("sensitivity", "Quantisation sensitivity", "What each group of Linears costs when it alone is quantised.",
         draw_sensitivity),
)  # fmt: skip


def _curve_with_interval(axes: Axes, curve: Sequence[Record], label: str, k: int) -> None:
    budgets = [record["budget"] for record in curve]
    colour = SERIES[k % len(SERIES)]
    axes.plot(budgets, [r["ndcg_at_5"] for r in curve], label=label, color=colour, marker=MARKERS[k % len(MARKERS)])
    low, high = [r["ndcg_low"] for r in curve], [r["ndcg_high"] for r in curve]
    if len(curve) > 1:
        axes.fill_between(budgets, low, high, color=colour, alpha=0.14, linewidth=0)
    else:
        axes.vlines(budgets, low, high, color=colour, alpha=0.5, linewidth=2)


def _labelled_curve(axes: Axes, records: Sequence[Record], value: str, title: str, form: str) -> None:
    """A value by budget, with each number beside its mark."""
    axes.plot([r["budget"] for r in records], [r[value] for r in records], color=SERIES[0], marker=MARKERS[0])
    for record in records:
        axes.annotate(form.format(record[value]), (record["budget"], record[value]), xytext=(-5, 4),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axes.set_title(title, fontsize=9.5, color=LIGHT["muted"], loc="left")
    axes.tick_params(labelsize=8.5)
    axes.margins(x=0.2, y=0.15)


def _finish(figure: Figure, axes: Axes, x: str, y: str) -> Figure:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if len(labels) > 3 else len(labels), fontsize=9
        )
    elif labels:
        axes.set_title(labels[0], fontsize=9, color=LIGHT["muted"], loc="left")
    return figure


def _log_axis(axis: Axis) -> None:
    """Plain numbers instead of powers of ten; between them too where the axis spans little more than one."""

    def minor(value: float, _: object) -> str:
        low, high = axis.get_view_interval()
        return f"{value:,.10g}" if 0 < high < 30 * low and f"{value:e}"[0] in "246" else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(FuncFormatter(minor))
