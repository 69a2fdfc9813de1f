"""Retrieval data sets as they lie on disk, in the shapes of docs/bench.md, all read into one form."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaembed.runtime.errors import UsageError
from metaembed.runtime.items import join_title
from metaembed.runtime.search import find_images

log = logging.getLogger(__name__)
CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"
METADATA = ("metadata.jsonl", "metadata.csv")
GRADES = ("score", "relevance", "rel", "grade", "label")  # what headers of judgements call the last column


@dataclass(frozen=True)
class Item:
    """A query or a candidate: text, an image file, or both."""

    id: str
    text: str | None
    image: Path | None


@dataclass(frozen=True)
class Dataset:
    """``relevant[k]`` maps places in ``candidates`` to the grade, above 0, that query k gives them; none is empty.

    ``unjudged`` counts the queries that were left out because no candidate is relevant to them.
    """

    name: str
    candidates: tuple[Item, ...]
    queries: tuple[Item, ...]
    relevant: tuple[dict[int, float], ...]
    unjudged: int = 0


def load_dataset(folder: Path, split: str = "test") -> Dataset:
    """Read a folder of any supported shape.

    Raises:
        UsageError: the folder has no known shape, or a file of it is damaged or names what is not there.
    """
    if (folder / CORPUS).is_file():
        return _load_beir(folder, split)
    for name in METADATA:
        if (folder / name).is_file():
            return _load_image_folder(folder, folder / name)
    if (folder / QUERIES).is_file():
        return _load_images_and_queries(folder, split)
    raise UsageError(f"{folder} is no data set: it has neither {CORPUS}, nor {QUERIES}, nor {' or '.join(METADATA)}")


@contextmanager
def demo_dataset(count: int, queries: tuple[int, int, int], seed: int) -> Iterator[Dataset]:
    """The demo's own test set of symbol scenes, drawn afresh into a temporary folder from its seed."""
    from .scenes_folder import write_split
    from .scenes_queries import make_split

    with tempfile.TemporaryDirectory(prefix="scenes-") as work:
        folder = Path(work) / f"symbol scenes, test seed {seed}"
        write_split(make_split("test", seed, scenes=count, queries=queries), folder, quiet=True)
        yield load_dataset(folder)


def _load_beir(folder: Path, split: str) -> Dataset:
    """Candidates of neither text nor image are left out, unless a judgement calls one relevant."""
    rows = [
        (f"{CORPUS}, line {k}", _item(row, folder, f"{CORPUS}, line {k}")) for k, row in _read_jsonl(folder / CORPUS)
    ]
    judgements = _read_qrels(_find_qrels(folder, split))
    gaining = {candidate for _, candidate, grade in judgements if grade > 0}
    empty = {item.id: where for where, item in rows if item.text is None and item.image is None}
    if judged := sorted(empty.keys() & gaining):
        raise UsageError(f"{folder / empty[judged[0]]} has neither text nor image, but a judgement calls it relevant")
    if empty:
        log.warning(
            "%s: candidates with neither text nor image are left out: %d, %r first", folder, len(empty), min(empty)
        )
    candidates = [item for _, item in rows if item.id not in empty]
    kept = [judgement for judgement in judgements if judgement[1] not in empty]
    return _join(folder.name, candidates, _read_queries(folder), kept)


def _load_images_and_queries(folder: Path, split: str) -> Dataset:
    """Candidates are the image files; a judgement names one by its path in the folder, its file name or its bare stem."""
    queries = _read_queries(folder)
    asking = {query.image for query in queries}
    paths = [path for path in find_images(folder) if path not in asking]
    candidates = [Item(path.relative_to(folder).as_posix(), None, path) for path in paths]
    judgements = _read_qrels(_find_qrels(folder, split))
    names = {
        alias: item.id for item in reversed(candidates) for alias in (Path(item.id).stem, Path(item.id).name, item.id)
    }
    return _join(folder.name, candidates, queries, [(q, names.get(c, c), grade) for q, c, grade in judgements])


def _load_image_folder(folder: Path, metadata: Path) -> Dataset:
    """The imagefolder layout of Hugging Face's datasets: rows of ``file_name`` and ``query``; a row's page answers its query."""
    rows = list(_read_table(metadata) if metadata.suffix == ".csv" else (row for _, row in _read_jsonl(metadata)))
    for row in rows:
        if not row.get("file_name"):
            raise UsageError(f"{metadata} has a row without file_name")
    pages = {str(row["file_name"]): None for row in rows}
    candidates = [Item(name, None, _existing(folder, name, metadata.name)) for name in pages]
    asking = [row for row in rows if str(row.get("query") or "").strip()]
    for row in asking:
        if not isinstance(row["query"], str):
            raise UsageError(f"{metadata}: the query of {row['file_name']!r} is no text; write a row for each query")
    queries = [Item(text, text, None) for text in dict.fromkeys(row["query"] for row in asking)]
    judgements = [(row["query"], str(row["file_name"]), 1.0) for row in asking]
    return _join(folder.name, candidates, queries, judgements)


def _join(
    name: str, candidates: Iterable[Item], queries: Iterable[Item], judgements: Iterable[tuple[str, str, float]]
) -> Dataset:
    """Judgements by place. Ids that only the judgements know are an error: a split of another corpus, most likely."""
    candidates, queries = tuple(candidates), list(queries)
    places = {item.id: place for place, item in enumerate(candidates)}
    graded: dict[str, dict[int, float]] = {query.id: {} for query in queries}
    for what, items in (("candidates", candidates), ("queries", queries)):
        id_, count = Counter(item.id for item in items).most_common(1)[0] if items else ("", 1)
        if count > 1:
            raise UsageError(f"{name}: ids of {what} have to be unique, and {id_!r} occurs {count} times")
    given: dict[tuple[str, str], float] = {}
    for query, candidate, grade in judgements:
        if given.setdefault((query, candidate), grade) != grade:
            raise UsageError(f"{name}: candidate {candidate!r} is judged twice for query {query!r}, and not alike")
        if query not in graded or candidate not in places:
            what = f"query {query!r}" if query not in graded else f"candidate {candidate!r}"
            raise UsageError(f"{name}: the judgements name {what}, which the data set does not have")
        if grade > 0:
            graded[query][places[candidate]] = grade
    kept = tuple(query for query in queries if graded[query.id])
    if not kept:
        raise UsageError(f"{name}: no query has a relevant candidate, so there is nothing to measure")
    return Dataset(name, candidates, kept, tuple(graded[query.id] for query in kept), len(queries) - len(kept))


def _read_queries(folder: Path) -> list[Item]:
    queries = [(f"{QUERIES}, line {k}", row) for k, row in _read_jsonl(folder / QUERIES)]
    items = [_item(row, folder, where) for where, row in queries]
    for (where, _), item in zip(queries, items, strict=True):
        if item.text is None and item.image is None:
            raise UsageError(f"{folder / where} has neither text nor image")
    return items


def _item(row: dict[str, Any], folder: Path, where: str) -> Item:
    """BEIR's ``_id``, ``title`` and ``text``, and our ``image``, a path relative to the folder."""
    if row.get("_id") in (None, ""):
        raise UsageError(f"{folder / where} has no _id")
    title, text = row.get("title"), row.get("text")
    if not all(part is None or isinstance(part, str) for part in (title, text)):
        raise UsageError(f"{folder / where}: title and text are strings, or null where absent")
    image = _existing(folder, str(row["image"]), where) if row.get("image") else None
    return Item(str(row["_id"]), join_title(title, text), image)


def _existing(folder: Path, name: str, where: str) -> Path:
    path = folder / name  # which may be a link to elsewhere, as in Hugging Face's cache
    if os.path.isabs(name) or Path(os.path.normpath(name)).parts[:1] == ("..",) or not path.is_file():
        raise UsageError(f"{folder / where} names the image {name!r}, which is not in the folder")
    return path


def _find_qrels(folder: Path, split: str) -> Path:
    places = (folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv")
    for path in places:
        if path.is_file():
            return path
    raise UsageError(f"{folder} has no relevance judgements (qrels/{split}.tsv or qrels.tsv)")


def _read_qrels(path: Path) -> list[tuple[str, str, float]]:
    """BEIR's three columns, or trec_eval's four, with or without a header."""
    lines = [line for line in _text(path).split("\n") if line.strip()]
    rows = [line.rstrip("\r").split("\t" if "\t" in line else None) for line in lines]  # names may hold spaces
    if rows and rows[0][-1].strip().lower() in GRADES:
        rows = rows[1:]
    try:
        return [(row[0], row[-2], _grade(row[-1])) for row in rows if _has_columns(row)]
    except ValueError as error:
        raise UsageError(f"{path} is no table of query-id, corpus-id and score ({error})") from None


def _grade(text: str) -> float:
    grade = float(text)
    if not math.isfinite(grade):
        raise ValueError(f"{text!r} is no grade")
    return grade


def _text(path: Path) -> str:
    """A file's text in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None


def _has_columns(row: list[str]) -> bool:
    if len(row) not in (3, 4):
        raise ValueError(f"a row has {len(row)} columns")
    return True


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} is not an object")
        yield number, row


def _read_table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from csv.DictReader(_text(path).splitlines(keepends=True))
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as CSV ({error})") from None
