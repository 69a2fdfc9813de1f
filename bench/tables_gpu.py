"""Tables of what was measured on GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metaembed.runtime.manifest import VISION

from .records import Record, StoredRecord, group, of_kind
from .table import Table

OURS = "bundle "
GRAPHS = ", CUDA graphs"  # our contestant whose queries are recorded
EXACT = "torch, float32 products"  # the competitor that computes what we do


def make_gpu_race(records: Sequence[Record]) -> Table | None:
    """The bundle against PyTorch on one GPU; a row an input."""
    found = _on(records, "encoder_gpu", "model", "precision", "opset", "input", "contestant")
    if not found:
        return None
    names = [name for (name,) in group(found, "contestant")]
    ways = [way for way in ("", GRAPHS) if any(_is_ours(name, way) for name in names)]
    others = [name for name in names if not name.startswith(OURS)]
    rows = []
    for (gpu, model, precision, opset, case), runs in group(
        found, "gpu", "model", "precision", "opset", "input"
    ).items():
        ours = [next((run for run in runs if _is_ours(run["contestant"], way)), None) for way in ways]
        theirs = [next((run for run in runs if run["contestant"] == name), None) for name in others]
        ratios = [_ratio(one, [run for run in theirs if run]) for one in ours]
        rows.append(
            (gpu, f"{model} {precision}, opset {opset}, {case}", *(_cell(run) for run in (*ours, *theirs)), *ratios)
        )
    note = "Median ms (GiB on the GPU); contestants took turns, each in a process of its own. Ratio: the best of PyTorch over ours."
    return Table(
        ("GPU", "model, input", *(f"bundle{way}" for way in ways), *others, *(f"ratio{way}" for way in ways)),
        tuple(rows),
        note,
    )


def make_gpu_latency(records: Sequence[Record]) -> Table | None:
    """Each graph alone, for every side and number of vectors."""
    found = _on(records, "engine", "model", "artefact", "batch", "graph", "side", "vectors")
    rows = tuple(
        (
            r["gpu"],
            f"{r['model']}, " + _what(r),
            f"{r['p50_ms']:.1f}",
            f"{r['p99_ms']:.1f}",
            f"{r['limit_ms']:.2f}" if "limit_ms" in r else "",
            f"{r['limit_ms'] / r['p50_ms']:.0%}" if "limit_ms" in r else "",
        )
        for r in found
    )
    note = "The limit: all operations at the GPU's dense peak rate, or all weights read once, the slower."
    return Table(("GPU", "graph", "p50 ms", "p99 ms", "limit ms", "share of the limit"), rows, note) if rows else None


def make_gpu_scoring(records: Sequence[Record]) -> Table | None:
    """MaxSim by each means, candidates on the GPU or not."""
    found = _on(records, "scoring_gpu", "model", "artefact", "budget", "queries", "candidates")
    if not found:
        return None
    means = [name for (name,) in group(found, "candidates")]
    rows = []
    for (gpu, model, budget, queries), runs in group(found, "gpu", "model", "budget", "queries").items():
        at = {run["candidates"]: run for run in runs}
        ours, exact = at.get("device"), at.get(EXACT)
        rows.append(
            (
                gpu,
                f"{model}, {budget}" + (f", {queries} queries" if queries != "1" else ""),
                f"{runs[0]['items']:,}",
                *(f"{at[name]['p50_ms']:.2f}" if name in at else "" for name in means),
                f"{ours['limit_ms'] / ours['p50_ms']:.0%}" if ours and "limit_ms" in ours else "",
                f"{exact['p50_ms'] / ours['p50_ms']:.2f}" if ours and exact else "",
            )
        )
    note = (
        "Median ms from float32 queries on the host to float32 scores there, by turns. The share is of the GPU's limit, candidates "
        "read once. Ratio: PyTorch's float32 products over ours."
    )
    names = {"device": "ours", "graph": "scorer graph", "host": "ours, from the host", "cpu": "ours, on the CPU"}
    head = (
        "GPU",
        "model, budget",
        "candidates",
        *(names.get(name, name) for name in means),
        "share of the limit",
        "ratio",
    )
    return Table(head, tuple(rows), note)


def _on(records: Sequence[Record], kind: str, *keys: str) -> list[Record]:
    """The latest records for each GPU, which ``gpu`` names."""
    named = (StoredRecord(r, gpu=(r.get("machine") or {}).get("gpu") or "?") for r in records if r["kind"] == kind)
    return of_kind(named, kind, "gpu", *keys)


def _is_ours(contestant: str, way: str) -> bool:
    return contestant.startswith(OURS) and contestant.endswith(GRAPHS) == (way == GRAPHS)


def _what(record: Mapping[str, object]) -> str:
    if record["graph"] == VISION:
        return f"image of {record['image_tokens']} tokens"
    return f"{record['side']}, {record['vectors']} vectors, {record['positions']} positions"


def _cell(run: Record | None) -> str:
    if run is None:
        return ""
    if "error" in run:
        return "cannot"
    held = f" ({run['gpu_mib'] / 1024:.1f})" if "gpu_mib" in run else ""
    return f"{run['median_ms']:.1f}{held}"


def _ratio(ours: Record | None, others: Sequence[Record]) -> str:
    ran = [run["median_ms"] for run in others if "error" not in run]
    return f"{min(ran) / ours['median_ms']:.2f}" if ran and ours and "error" not in ours else ""
