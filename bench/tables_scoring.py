"""Tables of `metaembed-bench scoring`: every measurement once for each kind of processor that it was taken on."""

from __future__ import annotations

from collections.abc import Sequence

from .records import Record, by_kernels, group
from .scoring_contestants import OURS
from .table import Table


def make_scoring(records: Sequence[Record]) -> Table | None:
    found = by_kernels(records, "scoring_contest", "dim", "budget", "queries")
    if not found:
        return None
    rows = tuple(
        (
            r["kernels"],
            f"{r['dim']}, {r['budget']}" + (f", batch of {r['queries']}" if r["queries"] > 1 else ""),
            f"{r['candidates']:,}",
            f"{r['timings'][OURS]['median_ms']:.1f}",
            f"{r['limit_ms']:.1f} ({r['bound_by']})",
            f"{r['share_of_limit']:.0%}",
            f"{r['share_of_sgemm']:.0%}",
            f"{r['times_the_best_other']:.2f} ({r['best_other']})",
            f"{r['times_the_best_exact']:.2f} ({r['best_exact']})",
            f"{r['worst_error'][OURS]:.0e}",
        )
        for r in found
    )
    head = (
        "processor", "dims, budget", "candidates", "ms", "limit ms", "of the limit", "of sgemm",
        "x best other", "x best as exact", "error",
    )  # fmt: skip
    last = found[-1]
    note = (
        f"bf16 candidates, float32 queries, {last['threads']} threads of {last['machine']['cpu']}. Limits are loops of reads and "
        "of multiply-adds that took turns with the contestants; above 100 % the reading loop was the slower reader. "
        "Others: NumKong 7.8, ONNX Runtime, torch and numpy; as exact: within 2e-6 r_q of float64, which those that round the "
        "query to bf16 are not."
    )
    return Table(head, rows, note)


def make_int8(records: Sequence[Record]) -> Table | None:
    found = by_kernels(records, "scoring_int8", "dim", "budget")
    rows = tuple(
        (r["kernels"], f"{r['dim']}, {r['budget']}", f"{r['candidates']:,}", f"{r['timings']['bf16']['median_ms']:.1f}",
         f"{r['timings']['int8']['median_ms']:.1f}", f"{r['times_bf16']:.2f}", f"{r['worst_error']:.0e}")
        for r in found
    )  # fmt: skip
    head = ("processor", "dims, budget", "candidates", "bf16 ms", "int8 ms", "ratio", "error")
    return Table(head, rows) if rows else None


def make_approximate(records: Sequence[Record]) -> Table | None:
    found = by_kernels(records, "approximate", "cascade", "items")
    if not found:
        return None
    walked = {(r["kernels"], r["items"], r["cascade"].removeprefix("approximate ")): r for r in found
              if r["cascade"].startswith("approximate ")}  # fmt: skip
    rows = []
    for r in found:
        if walk := walked.get((r["kernels"], r["items"], r["cascade"])):
            rows.append((r["kernels"], f"{r['items']:,}", r["cascade"], f"{r['median_ms']:.1f}", f"{r['recall_at_10']:.3f}",
                         f"{walk['median_ms']:.1f}", f"{walk['recall_at_10']:.3f}"))  # fmt: skip
    last = found[-1]
    note = f"{last['source']}, {last['queries']} queries, {last['threads']} threads; built in {last['build_s']:,.0f} s."
    head = ("processor", "items", "cascade", "scan ms", "recall@10", "walk ms", "recall@10, walked")
    return Table(head, tuple(rows), note[:1].upper() + note[1:])


def make_cascades(records: Sequence[Record]) -> Table | None:
    found = by_kernels(records, "cascade", "cascade", "items")
    if not found:
        return None
    rows = tuple(
        (r["kernels"], r["cascade"], f"{r['median_ms']:.1f}", f"{r['full_ms']:.0f}", f"{r['times_full']:.1f}",
         f"{r['recall_at_10']:.3f}")
        for r in found
    )  # fmt: skip
    last = found[-1]
    note = f"{last['items']:,} {last['source']}, {last['queries']} queries, {last['threads']} threads."
    return Table(("processor", "cascade", "ms", "full scan ms", "x full scan", "recall@10"), rows, note)


def make_scaling(records: Sequence[Record]) -> Table | None:
    """Nanoseconds per candidate vector by the number of candidates: equal along a row where time is linear in that, and
    from row to row of one r_q where it is linear in r_c."""
    found = by_kernels(records, "scoring_scaling", "budget", "candidates")
    if not found:
        return None
    counts = sorted({r["candidates"] for r in found})
    rows = []
    for (kernels, budget), curve in group(found, "kernels", "budget").items():
        at = {r["candidates"]: r["median_ms"] * 1e6 / r["candidates"] / int(budget.split(",")[1]) for r in curve}
        rows.append((kernels, budget, *(f"{at[count]:.1f}" if count in at else "" for count in counts)))
    note = f"ns a candidate vector, one query, {found[0]['dim']} dims, {found[-1]['threads']} threads."
    return Table(("processor", "budget", *(f"{count:,}" for count in counts)), tuple(rows), note)
