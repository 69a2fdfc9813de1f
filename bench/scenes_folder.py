"""Symbol scenes on disk: PNG pages, and corpus, queries and relevance judgements in BEIR's file layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metaembed.runtime.command import progress
from metaembed.runtime.errors import UsageError

from .scenes import COLOUR_WORDS, WORDS, Scene
from .scenes_queries import Split
from .scenes_render import render


def write_split(split: Split, folder: Path, *, force: bool = False, quiet: bool = False) -> None:
    """Write pages/*.png, query_pages/*.png, corpus.jsonl, queries.jsonl and qrels.tsv; all of the folder or nothing.

    A corpus line says what its page shows, item by item, boxes in px; an image's path is relative to the folder.
    """
    if folder.exists() and not force:
        raise UsageError(f"{folder} already exists; name another folder, or add --force to replace it")
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_all(split, partial, quiet)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_all(split: Split, folder: Path, quiet: bool) -> None:
    (folder / "pages").mkdir(parents=True)
    (folder / "query_pages").mkdir()
    for k, scene in enumerate(progress(split.scenes, "pages", quiet=quiet)):
        render(scene).save(folder / _page(k))
    for k, query in enumerate(split.queries):
        if query.page:
            render(query.page).save(folder / _query_page(k))
    _write_lines(folder / "corpus.jsonl", (_corpus_line(k, scene) for k, scene in enumerate(split.scenes)))
    _write_lines(folder / "queries.jsonl", (_query_line(k, split) for k in range(len(split.queries))))
    with (folder / "qrels.tsv").open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for k, query in enumerate(split.queries):
            file.writelines(f"{_query_id(k)}\t{_page_id(answer)}\t1\n" for answer in split.relevant(query))


def _corpus_line(k: int, scene: Scene) -> dict[str, Any]:
    items = [
        {
            "symbol": WORDS[item.symbol],
            "colour": COLOUR_WORDS[item.colour],
            "box": [item.left, item.top, item.size, item.size],
        }
        for item in scene.items
    ]
    return {"_id": _page_id(k), "image": _page(k), "width": scene.width, "height": scene.height, "items": items}


def _query_line(k: int, split: Split) -> dict[str, Any]:
    query = split.queries[k]
    return {
        "_id": _query_id(k),
        "kind": query.kind,
        "text": query.text,
        "image": _query_page(k) if query.page else None,
        "names_unseen_pair": bool(query.pairs & split.unseen),
    }


def _page_id(k: int) -> str:
    return f"page-{k:05d}"


def _query_id(k: int) -> str:
    return f"query-{k:05d}"


def _page(k: int) -> str:
    return f"pages/{_page_id(k)}.png"


def _query_page(k: int) -> str:
    return f"query_pages/{_query_id(k)}.png"


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
