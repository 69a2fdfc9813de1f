"""Queries over symbol scenes: text that names items, a small page that shows them, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scenes import (
    COLOUR_WORDS,
    WORDS,
    Pair,
    Scene,
    allowed_pairs,
    held_out_pairs,
    place_items,
    sample_scene,
    split_generator,
)

KINDS = ("text", "image", "image+text")
PAGE_SIDE = 84  # px of a query's page


@dataclass(frozen=True)
class Query:
    """Asks for the scenes that hold all of ``pairs``: in words (``text``), by showing them (``page``), or by both."""

    pairs: frozenset[Pair]
    text: str | None
    page: Scene | None

    @property
    def kind(self) -> str:
        return "text" if self.page is None else "image" if self.text is None else "image+text"


@dataclass(frozen=True)
class Split:
    """Candidate scenes and the queries asked of them. ``unseen`` are the pairs that training never showed."""

    scenes: tuple[Scene, ...]
    queries: tuple[Query, ...]
    unseen: frozenset[Pair]

    def relevant(self, query: Query) -> list[int]:
        """Indexes of the scenes that hold every pair the query asks for."""
        return [k for k, scene in enumerate(self.scenes) if query.pairs <= scene.pairs]


def phrase(pair: Pair) -> str:
    """``a red umbrella``."""
    colour = COLOUR_WORDS[pair[1]]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {WORDS[pair[0]]}"


def enumerate_pairs(pairs: Sequence[Pair]) -> str:
    """``a red umbrella, an orange bell and a blue anchor``."""
    *head, last = map(phrase, pairs)
    return f"{', '.join(head)} and {last}" if head else last


def text_query(pairs: Sequence[Pair]) -> Query:
    return Query(frozenset(pairs), enumerate_pairs(pairs), None)


def image_query(rng: np.random.Generator, pairs: Sequence[Pair]) -> Query:
    return Query(frozenset(pairs), None, place_items(rng, pairs, PAGE_SIDE, PAGE_SIDE))


def image_text_query(rng: np.random.Generator, pairs: Sequence[Pair]) -> Query:
    """The first pair is shown, the others are named: a page, and ``and a blue anchor``."""
    page = place_items(rng, pairs[:1], PAGE_SIDE, PAGE_SIDE)
    return Query(frozenset(pairs), f"and {enumerate_pairs(pairs[1:])}", page)


def ask(rng: np.random.Generator, kind: str, pairs: Sequence[Pair]) -> Query:
    """A query of one of KINDS for these pairs."""
    if kind == "text":
        return text_query(pairs)
    return (image_query if kind == "image" else image_text_query)(rng, pairs)


def choose_pairs(rng: np.random.Generator, scene: Scene, count: int, must: frozenset[Pair] = frozenset()) -> list[Pair]:
    """``count`` of the scene's pairs in random order, at least one of them from ``must`` if that is not empty."""
    pairs = sorted(scene.pairs)
    chosen = [pairs[k] for k in rng.permutation(len(pairs))]
    if must:
        chosen.sort(key=lambda pair: pair not in must)  # stable: the others stay shuffled
        chosen[:count] = [chosen[k] for k in rng.permutation(count)]
    return chosen[:count]


def make_split(
    split: str, seed: int, *, scenes: int = 2000, queries: Sequence[int] = (500, 200, 200), varied: float = 0.25
) -> Split:
    """A split's candidates (a share of them of varied size) and its text, image and image+text queries.

    Each query asks for two or three pairs of one scene; every second one names a pair that training never showed.
    """
    rng = split_generator(split, seed)
    pairs, unseen = allowed_pairs(split), frozenset(held_out_pairs(split))
    candidates = tuple(sample_scene(rng, pairs, varied=k < round(varied * scenes)) for k in range(scenes))
    with_unseen = [scene for scene in candidates if scene.pairs & unseen]
    asked = []
    for kind, count in zip(KINDS, queries, strict=True):
        for k in range(count):
            must = unseen if k % 2 and with_unseen else frozenset()
            source = with_unseen if must else candidates
            scene = source[int(rng.integers(len(source)))]
            asked.append(ask(rng, kind, choose_pairs(rng, scene, int(rng.integers(2, 4)), must)))
    return Split(candidates, tuple(asked), unseen)
