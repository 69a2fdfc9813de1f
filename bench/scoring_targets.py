"""What scoring and the index are meant to reach, and what of it the records say was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .records import Record, by_kernels
from .scoring_contestants import NUMKONG, ORT, OURS, PLAIN, TORCH
from .table import Table

RIVALS = (
    NUMKONG,
    ORT,
    TORCH,
    PLAIN,
)  # those that the targets name; torch bf16, which they do not, is in the contest's table
MISSED = "missed: "


@dataclass(frozen=True)
class Target:
    """A figure of a kind of record, and the least, or the most, that it is meant to be."""

    what: str
    kind: str
    of: Mapping[str, Any]  # the record's other fields by which it is found
    figure: Callable[[Record], float]
    least: float | None = None
    most: float | None = None
    form: str = "{:.2f}x"

    def goal(self) -> str:
        return ">= " + self.form.format(self.least) if self.most is None else "<= " + self.form.format(self.most)

    def judge(self, record: Record | None) -> str:
        """The figure as text, marked where it misses; empty without a record."""
        if record is None:
            return ""
        value = self.figure(record)
        met = value >= self.least if self.most is None else value <= self.most
        return ("" if met else MISSED) + self.form.format(value)


def times_best_rival(record: Record) -> float:
    """The best rival's milliseconds over ours."""
    timings = record["timings"]
    return min(timings[name]["median_ms"] for name in RIVALS if name in timings) / timings[OURS]["median_ms"]


def _contest(
    budget: str, share: str, least: float, rivals: float, *, dim: int = 3584, queries: int = 1
) -> list[Target]:
    of = {"dim": dim, "budget": budget, "queries": queries}
    name = f"{dim}, {budget}" + (f", batch of {queries}" if queries > 1 else "")
    limit = {"share_of_limit": "the limit", "share_of_multiply_adds": "multiply-adds", "share_of_sgemm": "sgemm"}[share]
    return [
        Target(f"{name}: of {limit}", "scoring_contest", of, lambda r: r[share], least, form="{:.1%}"),
        Target(f"{name}: best rival's time over ours", "scoring_contest", of, times_best_rival, rivals),
    ]


TARGETS: tuple[Target, ...] = (
    *_contest("1,1", "share_of_limit", 0.85, 1.4),
    *_contest("2,4", "share_of_limit", 0.85, 1.4),
    *_contest("4,8", "share_of_limit", 0.75, 1.1),
    *_contest("8,16", "share_of_multiply_adds", 0.75, 1.1),
    *_contest("16,64", "share_of_multiply_adds", 0.75, 1.1),
    *_contest("16,64", "share_of_sgemm", 0.8, 1.0, queries=32),
    *_contest("16,64", "share_of_limit", 0.65, 1.3, dim=128),
    *(
        Target(f"3584, {budget}: bf16 time over int8's", "scoring_int8", {"dim": 3584, "budget": budget},
               lambda r: r["times_bf16"], 1.5)
        for budget in ("1,1", "2,4", "4,8")
    ),
    Target("cascade 1,1:1000 16,64: full scan's time over its", "cascade", {"cascade": "1,1:1000 16,64"},
           lambda r: r["times_full"], 20, form="{:.1f}x"),
    Target("cascade 1,1:1000 16,64: recall@10", "cascade", {"cascade": "1,1:1000 16,64"},
           lambda r: r["recall_at_10"], 0.99, form="{:.3f}"),
    Target("cascade 1,1:4000 4,8:500 16,64: full scan's time over its", "cascade", {"cascade": "1,1:4000 4,8:500 16,64"},
           lambda r: r["times_full"], 20, form="{:.1f}x"),
    Target("cascade 1,1:4000 4,8:500 16,64: recall@10", "cascade", {"cascade": "1,1:4000 4,8:500 16,64"},
           lambda r: r["recall_at_10"], 0.99, form="{:.3f}"),
    *(
        Target(f"{dim}: memory beside the candidates, MiB a thread", "scoring_memory", {"dim": dim},
               lambda r: r["mib_per_thread"], most=16, form="{:.1f}")
        for dim in (3584, 128)
    ),
    Target("search of 3 million items: memory beside the index, MiB a thread", "search_memory", {},
           lambda r: r["mib_per_thread"], most=16, form="{:.1f}"),
    Target("first 1,1 query of a 10 GiB index: read, of the 1,1 group", "index_opening", {},
           lambda r: r["read_mib"] / r["group_mib"], most=1.05, form="{:.1%}"),
    Target("50 kills while adding 2,000 items: lost or damaged", "index_kills", {},
           lambda r: r["lost"] + r["damaged"] + r["twice"], most=0, form="{:.0f}"),
)  # fmt: skip


def make_targets(records: Sequence[Record]) -> Table | None:
    """A row for each target, a column for each sort of processor."""
    latest = [(target, _latest(records, target)) for target in TARGETS]
    processors = sorted({name for _, found in latest for name in found})
    if not processors:
        return None
    rows = tuple(
        (target.what, target.goal(), *(target.judge(found.get(name)) for name in processors))
        for target, found in latest
    )
    note = f"Rivals: {'; '.join(RIVALS)}."
    return Table(("dims, budget, or what else", "target", *processors), rows, note)


def _latest(records: Sequence[Record], target: Target) -> dict[str, Record]:
    found = by_kernels(records, target.kind, *target.of)
    return {r["kernels"]: r for r in found if all(r[key] == value for key, value in target.of.items())}
