"""The recipe: which groups are quantised, with which ranges and smoothing, and what each costs; to read, edit and replay."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from metaembed.runtime.errors import UsageError

from .formats import FORMATS
from .smoothing import Smoothing

FORMAT, VERSION = "metaembed-recipe", 1
LARGEST_AMAX = 1e30  # its scale is finite in bf16 and float32


@dataclass(frozen=True)
class GroupRecipe:
    """One group of Linears.

    Attributes:
        amax: magnitude of the input that becomes the largest code.
        share: of the Linears' multiply-adds over the calibration set.
        cost: when this group alone is quantised, the mean over inputs of 1 - the cosine of the worst vector; None where it
            was not measured.
        twice: quantise the input in two steps, its codes and those of the remainder, at twice the products.
    """

    name: str
    amax: float
    share: float
    quantised: bool = True
    cost: float | None = None
    twice: bool = False


@dataclass(frozen=True)
class Recipe:
    """How a bundle was, or is to be, quantised.

    ``token_table``: the token table is in INT8, a scale per row. Older recipes do not say so, and keep it high.
    """

    type: str
    observer: str
    groups: tuple[GroupRecipe, ...]
    smoothings: tuple[Smoothing, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    token_table: bool = False

    @property
    def share(self) -> float:
        """Share of the Linears' multiply-adds that is quantised."""
        return math.fsum(group.share for group in self.groups if group.quantised)

    @property
    def high(self) -> list[str]:
        """Names of the groups kept in the graph's own precision."""
        return [group.name for group in self.groups if not group.quantised]

    @property
    def extra(self) -> float:
        """Products that quantising in two steps adds, as a share of the Linears' multiply-adds."""
        return math.fsum(group.share for group in self.groups if group.quantised and group.twice)

    @property
    def twice(self) -> list[str]:
        """Names of the groups that are quantised in two steps."""
        return [group.name for group in self.groups if group.quantised and group.twice]

    def quantising(self, names: Iterable[str]) -> Recipe:
        """The same recipe, with exactly these groups quantised."""
        wanted = set(names)
        return replace(self, groups=tuple(replace(group, quantised=group.name in wanted) for group in self.groups))

    def quantising_twice(self, names: Iterable[str]) -> Recipe:
        """The same recipe, with exactly these groups in two steps."""
        wanted = set(names)
        return replace(self, groups=tuple(replace(group, twice=group.name in wanted) for group in self.groups))

    def with_costs(self, costs: Mapping[str, float]) -> Recipe:
        groups = tuple(replace(group, cost=costs.get(group.name, group.cost)) for group in self.groups)
        return replace(self, groups=groups)

    def check_fits(self, names: Sequence[str]) -> None:
        """Raise UsageError unless the recipe speaks of exactly these groups."""
        strange = sorted(set(names) ^ {group.name for group in self.groups})
        if strange:
            raise UsageError(f"the recipe is of another model: {strange[0]} is in one and not in the other")

    def save(self, path: Path) -> None:
        # Lists of numbers stay on one line: a file of a line per channel is nothing anyone reads.
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        groups, smoothings = ([json.dumps(entry) for entry in data.pop(key)] for key in ("groups", "smoothings"))
        head = json.dumps(data, indent=1).removesuffix("\n}")
        lists = (
            f' "{key}": [\n  ' + ",\n  ".join(rows) + "\n ]" if rows else f' "{key}": []'
            for key, rows in (("groups", groups), ("smoothings", smoothings))
        )
        path.write_text(f"{head},\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe, perhaps edited by hand.

        Raises:
            UsageError: it is missing, of another format, or a field is missing or of the wrong kind; the sentence says which.
        """
        try:
            data = json.loads(path.read_bytes())
            if (data.pop("format"), data.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not of format {FORMAT} version {VERSION}")
            groups = tuple(GroupRecipe(**group) for group in data.pop("groups"))
            smoothings = tuple(
                Smoothing(**{**entry, "linears": tuple(entry["linears"]), "exponents": tuple(entry["exponents"])})
                for entry in data.pop("smoothings")
            )
            recipe = cls(groups=groups, smoothings=smoothings, **data)
            recipe._check()
        except OSError as error:
            raise UsageError(f"the recipe {path} cannot be read ({error.strerror})") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UsageError(f"the recipe {path} cannot be used ({type(error).__name__}: {error})") from None
        return recipe

    def _check(self) -> None:
        if self.type not in FORMATS:
            raise ValueError(f"type {self.type!r} is not one of {', '.join(FORMATS)}")
        if not isinstance(self.calibration, Mapping):
            raise ValueError(f"calibration is {self.calibration!r}, not an object")
        if not isinstance(self.observer, str):
            raise ValueError(f"observer is {self.observer!r}, not a text")
        if not isinstance(self.token_table, bool):
            raise ValueError(f"token_table is {self.token_table!r}, not true or false")
        names = [group.name for group in self.groups]
        for group in self.groups:
            if not isinstance(group.name, str) or names.count(group.name) > 1:
                raise ValueError(f"the name {group.name!r} is no text, or two groups have it")
            if not _is_between(group.amax, LARGEST_AMAX):
                raise ValueError(f"amax of {group.name} is {group.amax!r}")
            if not _is_between(group.share, 1):
                raise ValueError(f"share of {group.name} is {group.share!r}, not a number from 0 to 1")
            if group.cost is not None and not _is_between(group.cost, LARGEST_AMAX):
                raise ValueError(f"cost of {group.name} is {group.cost!r}, not a number")
            if not isinstance(group.quantised, bool):
                raise ValueError(f"quantised of {group.name} is {group.quantised!r}, not true or false")
            if not isinstance(group.twice, bool):
                raise ValueError(f"twice of {group.name} is {group.twice!r}, not true or false")
        if abs(math.fsum(group.share for group in self.groups) - 1) > 1e-6:
            raise ValueError("the groups' shares do not add up to 1")
        for smoothing in self.smoothings:
            if not all(type(exponent) is int and abs(exponent) <= 64 for exponent in smoothing.exponents):
                raise ValueError(f"exponents of {smoothing.source} are not whole numbers")


def _is_between(value: object, largest: float) -> bool:
    """Whether it is a number from 0 to ``largest``; true, false and NaN are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= largest
