"""Results of searches as text: JSON, and TREC's run files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields

from .errors import UsageError
from .index import Hit

TAG = "metaembed"  # the name of a run, in every line of TREC's format


def hit_fields(hit: Hit) -> dict[str, object]:
    """What a hit has: rank, id, score, and payload where there is one."""
    values = {field.name: getattr(hit, field.name) for field in fields(hit)}
    return {name: value for name, value in values.items() if value is not None}


def json_line(query: str, hits: Sequence[Hit]) -> str:
    return json.dumps({"query": query, "hits": [hit_fields(hit) for hit in hits]}, ensure_ascii=False) + "\n"


def trec_lines(query: str, hits: Sequence[Hit]) -> str:
    """``qid Q0 docid rank score tag``; scores have the nine digits that tell any two float32 numbers apart.

    trec_eval ranks by score alone, and equal scores by id, the last first; ours have the first id first.

    Raises:
        UsageError: an id holds white space.
    """
    query = check_trec(query)
    return "".join(f"{query} Q0 {check_trec(hit.id)} {hit.rank} {hit.score:.9g} {TAG}\n" for hit in hits)


def check_trec(id_: str) -> str:
    """The id, which readers of TREC's format have to find whole between blanks.

    Raises:
        UsageError: it holds white space, or nothing.
    """
    if id_.split() != [id_]:
        raise UsageError(
            f"the id {id_!r} cannot stand in a TREC run file, which has no quoting; write JSON lines instead"
        )
    return id_
