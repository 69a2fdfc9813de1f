"""A quality curve: nDCG@5 by budget and cascade, as ``metaembed-bench quality`` measured it on one data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .budget import Budget
from .errors import BundleError, UsageError


@dataclass(frozen=True)
class QualityCurve:
    """``values``: nDCG@5 by ``R_Q,R_C`` or ``FIRST:KEEP FINAL``, over so many ``candidates`` (0: not known)."""

    values: Mapping[str, float]
    candidates: int = 0
    source: str = ""

    @property
    def best(self) -> float:
        return max(self.values.values())

    def span(
        self, budget: Budget, first: Budget | None, survivors: int, candidates: int
    ) -> tuple[float | None, float | None]:
        """The least and the most to expect of a cascade, or of a budget alone (``first`` None), over so many candidates.

        The most is what the curve says of the cascade or else of its last stage alone. It is the least too where the cascade was
        measured over as many candidates; of more, the same number of survivors keeps less, at worst what the first stage
        alone ranks well.
        """
        alone = self.values.get(str(budget))
        if first is None:
            return alone, alone
        measured = self.values.get(name := f"{first}:{survivors} {budget}")
        most = alone if measured is None else measured
        if name in self.values and self.candidates >= candidates:
            return most, most
        ahead = self.values.get(str(first))
        return (None if most is None or ahead is None else min(ahead, most)), most


def curve_of(records: Sequence[Mapping[str, Any]]) -> QualityCurve:
    """The curve of the data set and artefact that were measured last; of several records of one budget the last counts."""
    found = [record for record in records if record.get("kind") == "quality"]
    last = [r for r in found if (r.get("dataset"), r.get("artefact")) == _subject(found[-1])]
    values = {str(record["cascade"] or record["budget"]): _ndcg(record) for record in last}
    source = " on ".join(str(part) for part in reversed(_subject(found[-1])) if part) if found else ""
    return QualityCurve(values, min((int(record.get("candidates") or 0) for record in last), default=0), source)


def read_curve(path: Path) -> QualityCurve:
    """See `curve_of`; from a file that ``metaembed-bench quality -o`` wrote.

    Raises:
        UsageError: no such file, or no quality record in it.
        BundleError: a line is damaged.
    """
    if not path.is_file():
        what = "is a folder, not a file of records" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; metaembed-bench quality BUNDLE -o FILE writes a quality curve")
    records: list[Mapping[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
            if record.get("kind") == "quality":
                curve_of([record])
                records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BundleError(f"{path}, line {number} is no quality record (nDCG@5 is a number from 0 to 1)") from None
    if not records:
        raise UsageError(f"{path} holds no quality records; metaembed-bench quality BUNDLE -o FILE writes them")
    return curve_of(records)


def _ndcg(record: Mapping[str, Any]) -> float:
    value = record["ndcg_at_5"]
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is no nDCG")
    return float(value)


def _subject(record: Mapping[str, Any]) -> tuple[Any, Any]:
    return record.get("dataset"), record.get("artefact")
