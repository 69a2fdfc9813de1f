"""Tables of what exports cost."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Record, of_kind
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


def _sized(record: Record) -> str:
    """The model, with its decoder layers where it has fewer than its size."""
    return record["model"] + ("" if record["layers"] == "all" else f", {record['layers']} layers")
