"""The tables of the report and of Markdown files, made from records alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metaembed.runtime.errors import UsageError

from .records import Record, by_kernels, group, of_kind
from .scoring_targets import make_targets
from .table import Table, TableKind, to_markdown
from .tables_cost import make_engine_layouts, make_export_parity, make_exports
from .tables_gpu import make_gpu_latency, make_gpu_race, make_gpu_scoring
from .tables_scoring import make_approximate, make_cascades, make_int8, make_scaling, make_scoring

MARKER = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
MISSING = "_Not measured yet._\n"


def make_demo_quality(records: Sequence[Record]) -> Table | None:
    found = of_kind(records, "quality", "dataset", "artefact", "budget", "cascade")
    if not found:
        return None
    rows = tuple(
        (
            record["cascade"] or record["budget"],
            f"{record['ndcg_at_5']:.3f}",
            f"{record['ndcg_low']:.3f} to {record['ndcg_high']:.3f}",
            f"{record['recall_at_1']:.3f}",
            f"{record['recall_at_10']:.3f}",
            f"{record['mrr']:.3f}",
            f"{record['index_kib_per_item']:.2f}",
        )
        for record in found
    )
    last = found[-1]
    note = f"{last['artefact']}; {last['dataset']}: {last['queries']:,} queries, {last['candidates']:,} candidates."
    return Table(("budget", "nDCG@5", "95 % interval", "R@1", "R@10", "MRR", "KiB an item"), rows, note)


def make_claims(records: Sequence[Record]) -> Table | None:
    found = of_kind(records, "claim_point", "system", "budget")
    if not found:
        return None
    budgets = [budget for (budget,) in group(found, "budget") if budget != "all tokens"]
    rows = []
    for (name,), points in group(found, "system").items():
        at = {point["budget"]: point for point in points}
        cells = [f"{at[budget]['ndcg_at_5']:.3f}" if budget in at else "" for budget in budgets]
        whole = at.get("all tokens")
        rows.append((name, *cells, f"{whole['ndcg_at_5']:.3f}" if whole else "", _sizes(points), _seeds(points)))
    last = found[-1]
    note = (
        f"nDCG@5 over {last['queries']:,} queries and {last['candidates']:,} candidates, test seed {last['test_seed']}."
    )
    return Table(("system", *budgets, "all tokens", "KiB an item", "models"), tuple(rows), note)


def make_verdicts(records: Sequence[Record]) -> Table | None:
    found = of_kind(records, "verdict", "claim")
    rows = tuple(
        (r["claim"], r["verdict"], f"{r['difference']:+.3f}", f"{r['low']:+.3f} to {r['high']:+.3f}", str(r["models"]))
        for r in found
    )
    note = "Difference of nDCG@5, paired over the queries; held when its whole 95 % interval is above 0."
    return Table(("claim", "here", "difference", "95 % interval", "models"), rows, note) if rows else None


def make_efficiency(records: Sequence[Record]) -> Table | None:
    costs = of_kind(records, "scoring_cost", "model", "budget")
    if not costs:
        return None
    measured = {(r["model"], r["budget"]): r for r in of_kind(records, "scoring", "model", "budget")}
    devices = list(costs[0]["limit_ms"])
    rows = tuple(
        (
            f"{cost['model']} {cost['budget']}",
            f"{cost['gflop']:,.2f}",
            f"{cost['index_gib']:,.2f}",
            *_measured_cells(measured.get((cost["model"], cost["budget"]))),
            *(f"{cost['limit_ms'][device]:,.2f}" for device in devices),
            f"{cost['reported']['ms']:.2f}" if cost["reported"] else "",
        )
        for cost in costs
    )
    note = (
        f"One query, {costs[0]['candidates']:,} candidates, bf16 index. Devices' columns are limits in ms: "
        "all operations at peak rate, or the index read "
        "once, whichever is slower. The paper's milliseconds, for 7B on an A100, cannot be one query streaming its index: "
        "42.72 GiB in 6.25 ms would be 7.3 TB/s, and the card reads 2.04."
    )
    head = (
        "model, budget",
        "GFLOP",
        "GiB",
        "ms here",
        "limit here",
        *devices,
        "paper ms",
    )
    return Table(head, rows, note)


def make_encoder_costs(records: Sequence[Record]) -> Table | None:
    costs = of_kind(records, "encoder_cost", "model", "input")
    if not costs:
        return None
    devices = list(costs[0]["limit_ms"])
    rows = tuple(
        (
            f"{cost['model']}, {cost['input']}",
            f"{cost['positions']:,}",
            f"{cost['vision_gflop']:,.1f}",
            f"{cost['language_gflop']:,.1f}",
            *(f"{cost['limit_ms'][device]:,.2f}" for device in devices),
        )
        for cost in costs
    )
    head = ("model, input", "positions", "vision GFLOP", "language GFLOP", *(f"ms, {name}" for name in devices))
    return Table(
        head, rows, "One input at the largest budget; the least milliseconds in bf16: arithmetic, not measured."
    )


def make_encoder_race(records: Sequence[Record]) -> Table | None:
    found = by_kernels(records, "encoder", "model", "input", "contestant")
    if not found:
        return None
    contestants = [name for (name,) in group(found, "contestant")]
    ours = [name for name in contestants if name.startswith("bundle ")]
    rows = []
    for (kernels, model, case), runs in group(found, "kernels", "model", "input").items():
        at = {run["contestant"]: run for run in runs}
        rows.append(
            (
                kernels,
                f"{model}, {case}",
                *(_race_cell(at.get(name)) for name in contestants),
                *(_speedup(at, name) for name in ours),
            )
        )
    machine = found[-1]["machine"]
    note = f"Median ms (p95), {machine['cpu']}, {found[-1]['threads']} threads. Ratios: the best of PyTorch over ours."
    ratios = (f"ratio, {name.removeprefix('bundle ')}" for name in ours)
    return Table(("processor", "model, input", *contestants, *ratios), tuple(rows), note)


def _ndcg_change(run: Record) -> float:
    return run["ndcg_at_5"] - run["ndcg_at_5_fp32"]


def make_calibration(records: Sequence[Record]) -> Table | None:
    """A row a contender: the worst of all budgets, and what it took."""
    found = of_kind(records, "calibration", "contender", "budget")
    if not found:
        return None
    rows = []
    for (name,), runs in group(found, "contender").items():
        if any("error" in run for run in runs):
            rows.append((name, "cannot", "", "", "", ""))
            continue
        worst = min(runs, key=lambda run: run["worst_cosine"])
        most = min(runs, key=_ndcg_change)
        heavy = runs[-1].get("weight_bytes")
        rows.append(
            (
                name,
                f"{runs[-1]['share_of_linear_multiplies']:.1%}",
                f"{worst['worst_cosine']:.4f}",
                f"{min(run['top10_overlap'] for run in runs):.3f}",
                f"{_ndcg_change(most):+.4f}"
                + (
                    f" ({most['ndcg_change_low']:+.4f} to {most['ndcg_change_high']:+.4f})"
                    if "ndcg_change_low" in most
                    else ""
                ),
                f"{heavy / runs[-1]['weight_bytes_source']:.3f}" if heavy else "",
            )
        )
    measured = [run for run in found if "error" not in run]
    if not measured:
        return None
    last = measured[-1]
    seeds = f"test seed{'s' if ',' in str(last['test_seed']) else ''} {last['test_seed']}"
    note = (
        f"Worst over {len(group(measured, 'budget'))} budgets on {last['queries']:,} queries, each of {last['candidates']} "
        f"candidates, {seeds}; changes with their 95 % interval, paired over the queries; weights against {last['artefact']}."
    )
    head = ("quantiser", "Linear work quantised", "worst vector's cosine", "top-10 overlap", "nDCG@5 change", "weights")
    return Table(head, tuple(rows), note)


TABLES = {
    kind.name: kind
    for kind in (
        TableKind("demo_quality", "Quality by budget", make_demo_quality),
        TableKind("claims", "The paper's claims, on the demo", make_claims),
        TableKind("verdicts", "Which claims held here", make_verdicts),
        TableKind("targets", "What scoring and the index are meant to reach", make_targets),
        TableKind("scoring", "MaxSim against the machine and other libraries", make_scoring),
        TableKind("int8", "The int8 first pass", make_int8),
        TableKind("scaling", "Scoring time by candidates and vectors", make_scaling),
        TableKind("cascades", "Cascades against the full scan", make_cascades),
        TableKind("approximate", "A first stage scanned, and walked through the HNSW graph", make_approximate),
        TableKind("exports", "What an export costs", make_exports),
        TableKind("export_parity", "Real sizes against Hugging Face", make_export_parity),
        TableKind("efficiency", "Scoring: cost, time here, and limits elsewhere", make_efficiency),
        TableKind("encoder_costs", "Encoding: cost and limits", make_encoder_costs),
        TableKind("engine_layouts", "TensorRT engines: what each layout takes", make_engine_layouts),
        TableKind("encoder_race", "Encoding: measured here", make_encoder_race),
        TableKind("gpu_race", "On a GPU: encoding beside PyTorch", make_gpu_race),
        TableKind("gpu_latency", "On a GPU: each graph", make_gpu_latency),
        TableKind("gpu_scoring", "On a GPU: MaxSim", make_gpu_scoring),
        TableKind("calibration", "Quantisation: what it costs in quality", make_calibration),
    )
}


def fill_tables(text: str, records: Sequence[Record]) -> str:
    """A Markdown text with every ``<!-- table: NAME -->`` block made again from the records.

    Raises:
        UsageError: a block names no known table, or has no end.
    """
    if text.count("<!-- table:") != len(MARKER.findall(text)):
        raise UsageError("a <!-- table: NAME --> line has no <!-- /table --> after it")
    return MARKER.sub(lambda found: found[1] + _filled(found[2], records) + found[4], text)


def _filled(name: str, records: Sequence[Record]) -> str:
    if name not in TABLES:
        raise UsageError(f"there is no table {name!r}; known: {', '.join(TABLES)}")
    table = TABLES[name].make(records)
    return MISSING if table is None else to_markdown(table)


def _sizes(points: Sequence[Record]) -> str:
    sizes = [point["index_kib_per_item"] for point in points]
    return f"{sizes[0]:.2f}" if len(sizes) == 1 else f"{min(sizes):.2f} to {max(sizes):.2f}"


def _seeds(points: Sequence[Record]) -> str:
    return str(points[0]["models"]) + ("" if points[0]["trained"] else ", untrained")


def _measured_cells(measured: Record | None) -> tuple[str, str]:
    if measured is None:
        return "", ""
    factor = measured["scaled_ms"] / measured["median_ms"]
    return f"{measured['scaled_ms']:,.1f}", f"{measured['limit_ms'] * factor:,.1f}"


def _race_cell(run: Record | None) -> str:
    if run is None:
        return ""
    return "cannot" if "error" in run else f"{run['median_ms']:,.1f} ({run['p95_ms']:,.1f})"


def _speedup(at: dict[str, Record], name: str) -> str:
    ours = at.get(name)
    torch = [at[who]["median_ms"] for who in ("HF eager", "torch.compile") if who in at and "error" not in at[who]]
    return f"{min(torch) / ours['median_ms']:.2f}" if torch and ours and "error" not in ours else ""
