"""The serve-time budget: how many Meta Token vectors a query and a candidate use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

from .errors import UsageError

# The nested groups that MetaEmbed trains together, smallest first (arXiv 2509.18095, section 3.2).
TRAINED_GROUPS = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, Python's or numpy's. Truth values are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, order=True)
class Budget:
    """A pair (r_q, r_c): the number of query and of candidate vectors, written ``8,16``.

    Raises:
        UsageError: a side is no whole number, or below 1.
    """

    query: int
    candidate: int

    def __post_init__(self) -> None:
        if not is_whole(self.query) or not is_whole(self.candidate):
            raise UsageError(
                f"budget ({self.query!r}, {self.candidate!r}) is not two whole numbers, for example Budget(8, 16)"
            )
        if self.query < 1 or self.candidate < 1:
            raise UsageError(f"budget {self} needs at least one vector on each side")

    def __str__(self) -> str:
        return f"{self.query},{self.candidate}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``R_Q,R_C``; anything else is a UsageError."""
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", text)
        if not match:
            raise UsageError(f"budget {text!r} is not of the form R_Q,R_C (two whole numbers, for example 8,16)")
        return cls(int(match[1]), int(match[2]))

    def check_within(self, query_tokens: int, candidate_tokens: int, *, owner: str = "this model has") -> Budget:
        """Return self if there are enough Meta Tokens for it, else raise UsageError."""
        for asked, has, side in (
            (self.query, query_tokens, "query"),
            (self.candidate, candidate_tokens, "candidate"),
        ):
            if asked > has:
                raise UsageError(f"budget {self} asks for {asked} {side} Meta Tokens; {owner} {has}")
        return self


def parse_budgets(texts: Iterable[str], query_tokens: int, candidate_tokens: int) -> tuple[Budget, ...]:
    """Read ``--budget`` values into sorted, distinct budgets; ``all`` stands for the trained groups that fit."""
    found: set[Budget] = set()
    for text in texts:
        if text.strip().lower() == "all":
            found |= {Budget(q, c) for q, c in TRAINED_GROUPS if q <= query_tokens and c <= candidate_tokens}
            found.add(Budget(query_tokens, candidate_tokens))
        else:
            found.add(Budget.parse(text).check_within(query_tokens, candidate_tokens))
    if not found:
        raise UsageError("no budget was given; name at least one, for example --budget 8,16")
    return tuple(sorted(found))
