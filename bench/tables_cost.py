"""Tables of what exports cost."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Record, group, of_kind
from .table import Table


def make_exports(records: Sequence[Record]) -> Table | None:
    found = of_kind(records, "export", "model", "layers", "tool", "budgets")
    if not found:
        return None
    rows = tuple(
        (
            _sized(r),
            r["tool"],
            "all" if len(r["budgets"]) == 5 else " ".join(r["budgets"]),
            f"{r['seconds']:.0f}",
            f"{r['peak_rss_mib']:,.0f}",
            f"{r['bytes_beyond_weights'] / 1e6:,.1f}"
            if "bytes_beyond_weights" in r
            else f"{r['bytes_written'] / 1e6:,.1f}",
        )
        for r in found
    )
    note = f"bf16, sparse weights of the real size, {found[-1]['threads']} threads of {found[-1]['machine']['cpu']}."
    return Table(("model", "by", "budgets", "s", "peak RSS MiB", "MB written beyond weights"), rows, note)


def make_export_parity(records: Sequence[Record]) -> Table | None:
    found = of_kind(records, "export-parity", "model", "layers")
    if not found:
        return None
    kinds = ("text", "image", "image + text")
    rows = tuple(
        (
            _sized(r),
            f"{r['weight_bytes'] / 1e9:.1f}",
            *(f"{r['max_abs'][kind]:.1e}" for kind in kinds),
            f"{r['top10_overlap']:.3f}",
            f"{r['peak_anonymous_mib']:,.0f}",
            f"{r['seconds'] / 60:.0f}",
        )
        for r in found
    )
    note = (
        f"Random bf16 weights of the real size, budget {' '.join(found[-1]['budgets'])}, tolerance "
        f"{found[-1]['tolerance']['max_abs']:g}; minutes of the whole export on {found[-1]['threads']} shared threads of "
        f"{found[-1]['machine']['cpu']} with {found[-1]['machine']['memory_gib']:.0f} GiB that did other work beside."
    )
    worst = (f"worst error, {kind}" for kind in kinds)
    return Table(("model", "GB of weights", *worst, "top-10 overlap", "peak anonymous MiB", "minutes"), rows, note)


def make_engine_layouts(records: Sequence[Record]) -> Table | None:
    """A row a layout: its language engines, the only ones in which layouts differ, whatever else was built beside them."""
    keys = ("model", "precision", "target", "layout")
    layouts = of_kind(records, "engine_layout", *keys)
    built = group(of_kind(records, "engine_build", *keys, "name"), *keys)
    rows = []
    for layout in layouts:
        found = [r for r in built.get(tuple(layout[key] for key in keys), ()) if r["name"] not in ("vision", "scorer")]
        if not found:
            continue
        engines = layout["engines"] - (layout["engines_built"] - len(found))
        share = engines / len(found)  # those that were not built count as the mean of those that were
        size = share * sum(r["bytes"] for r in found)
        rows.append(
            (
                f"{layout['model']} {layout['precision']}, {layout['layout']}",
                f"{engines}" + (f" ({len(found)} built, the rest computed)" if len(found) < engines else ""),
                f"{share * sum(r['profiles'] for r in found):.0f}",
                f"{size / 1e9:,.3f}",
                f"{size / found[0]['weight_bytes']:.2f}",
                f"{share * sum(r['cpu_seconds'] for r in found):,.0f}",
                f"{max(r['peak_memory_bytes'] for r in found) / 1e9:,.2f} "
                f"({max(r['estimated_peak_bytes'] for r in found) / 1e9:,.2f})",
            )
        )
    head = ("model, layout", "engines", "profiles", "GB", "of the weights", "processor s", "peak GB (estimated)")
    note = (
        "Language engines for {count} budgets, built ahead of time, without a GPU, by {builder} for {target}: size and cost of "
        "building, no speed. The engines of images and of MaxSim are the same in every layout."
    )
    if not rows:
        return None
    return Table(head, tuple(rows), note.format(count=len(layouts[-1]["budgets"]), **layouts[-1]))


def _sized(record: Record) -> str:
    """The model, with its decoder layers where it has fewer than its size."""
    return record["model"] + ("" if record["layers"] == "all" else f", {record['layers']} layers")
