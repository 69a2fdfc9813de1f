"""From data to an index: read items, encode those that the index does not hold yet, and append them batch by batch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .encoder import Encoder
from .errors import BundleError, MetaEmbedError, UsageError
from .index import Index
from .index_layout import Layout
from .index_payload import check_levels, too_deep
from .index_writer import IndexWriter
from .readable import encode_readable
from .search import find_images

log = logging.getLogger(__name__)
BATCH = 64  # items encoded and made durable together: what a kill can cost


@dataclass(frozen=True)
class Item:
    """Something to index: a text, an image, or both; `payload` is any JSON object that searches return and filter by."""

    id: str
    text: str | None = None
    image: Path | None = None
    payload: Mapping[str, Any] | None = None


@dataclass
class IndexingReport:
    """What `build_index` did."""

    added: int = 0
    known: int = 0
    unreadable: list[str] = field(default_factory=list)
    encode_s: float = 0.0

    @property
    def items_per_s(self) -> float:
        return self.added / self.encode_s if self.encode_s else 0.0


def read_data(path: Path) -> list[Item]:
    """The images of a folder (id: path within it), or the lines of a JSONL file.

    A line is an object with ``id``, ``text``, ``image`` (a path relative to the file), at least one of the two; its other
    fields become the payload. With ``_id`` instead it is BEIR's: its ``title`` stands before the text, and in the payload.

    Raises:
        UsageError: nothing there, a line that is not of this form, or an id that occurs twice.
    """
    if path.is_dir():
        if (corpus := path / "corpus.jsonl").is_file():
            log.warning("every image below %s is indexed; to index its corpus instead, give --data %s", path, corpus)
        return [Item(found.relative_to(path).as_posix(), image=found) for found in find_images(path)]
    if not path.is_file():
        raise UsageError(f"{path} is missing; --data takes a folder of images or a JSONL file")
    with path.open("rb") as lines:
        items = [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UsageError(f"{path} gives the id {item.id!r} twice")
        seen.add(item.id)
    if not items:
        raise UsageError(f'{path} is empty; write one {{"id": ..., "text": ..., "image": ...}} a line')
    return items


def _read_line(path: Path, number: int, line: bytes) -> Item:
    try:
        data = json.loads(line, parse_constant=_refuse)
        written = json.dumps(data, ensure_ascii=False, allow_nan=False)  # 1e999 is infinite
        written.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{path} line {number} holds half a character (a lone surrogate)") from None
    except RecursionError:
        raise too_deep(f"{path} line {number}") from None
    except ValueError as error:
        raise UsageError(f"{path} line {number} is not JSON ({error})") from None
    check_levels(written, f"{path} line {number}")
    if not isinstance(data, dict):
        raise UsageError(f"{path} line {number} is no JSON object")
    own, beir, text, image = (data.pop(name, None) for name in ("id", "_id", "text", "image"))
    id_ = beir if own is None else own
    title = data.get("title") if own is None else None
    if id_ is None or id_ == "":
        raise UsageError(f"{path} line {number} has no id; give every item a distinct one")
    if isinstance(id_, bool) or not isinstance(id_, (str, int)):
        raise UsageError(f"{path} line {number}: the id {id_!r} is neither a text nor a whole number")
    if not all(value is None or isinstance(value, str) for value in (text, image, title)):
        raise UsageError(f"{path} line {number}: text, image and title are strings, or null where absent")
    if text is None and title is None and not image:
        raise UsageError(f"{path} line {number} has neither a text nor an image")
    return Item(str(id_), join_title(title, text), path.parent / image if image else None, data or None)


def join_title(title: str | None, text: str | None) -> str | None:
    """What of a document is encoded: its title and its text, as BEIR's own models read them; None where both are blank."""
    return " ".join(part for part in (title, text) if part and part.strip()) or None


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON value")


def open_writer(
    encoder: Encoder, folder: Path, *, resume: bool, storage: str | None, screen: bool, vectors: int | None
) -> IndexWriter:
    """Create an index for an encoder, or open one that the same model began; what is None is the index's own.

    Raises:
        UsageError: the folder exists and `resume` is false, or another model or layout filled it.
    """
    largest = encoder.bundle.manifest.largest.candidate
    if vectors is not None and not 1 <= vectors <= largest:
        raise UsageError(f"{vectors} vectors per item were asked for; this bundle gives 1 to {largest}")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not resume or empty:
        if not empty:
            raise UsageError(f"{folder} exists; give --resume to continue or extend it, or another folder with -o")
        ends = [budget.candidate for budget in encoder.budgets]
        layout = Layout.for_vectors(encoder.dim, vectors or largest, storage or "bf16", ends, screen=screen)
        bundle = str(Path(encoder.bundle.folder).absolute())
        Index.create(folder, layout, fingerprint=encoder.fingerprint, bundle=bundle)
    writer = IndexWriter(folder)
    try:
        check_model(encoder, writer.about.get("fingerprint", ""), folder)
        _check_layout(writer.layout, folder, storage=storage, screen=screen, vectors=vectors, largest=largest)
    except BaseException:
        writer.close()
        raise
    return writer


def _check_layout(
    layout: Layout, folder: Path, *, storage: str | None, screen: bool, vectors: int | None, largest: int
) -> None:
    if layout.vectors != (vectors or layout.vectors):
        raise UsageError(f"{folder} stores {layout.vectors} vectors per item, not {vectors}; see --budget")
    if layout.vectors > largest:
        raise UsageError(f"{folder} stores {layout.vectors} vectors per item; this bundle gives 1 to {largest}")
    if layout.storage != (storage or layout.storage):
        raise UsageError(f"{folder} stores {layout.storage}; --storage {storage} is for a new index")
    if screen and not layout.screen:
        raise UsageError(f"{folder} was made without a screen; --screen is for a new index")


def check_model(encoder: Encoder, fingerprint: str, folder: Path) -> None:
    """Refuse a bundle whose vectors cannot be compared with those in the index."""
    if encoder.fingerprint != fingerprint:
        raise UsageError(f"{folder} was made with another model than {encoder.bundle.folder}; use that model's bundle")


def build_index(
    encoder: Encoder,
    writer: IndexWriter,
    items: Sequence[Item],
    *,
    update: bool = False,
    track: Callable[[Any], Iterable[Any]] = iter,
) -> IndexingReport:
    """Encode and append items. Every batch is durable when the next begins, so a killed run continues where it was.

    Args:
        update: encode known ids anew and replace them; by default they are passed over.
    """
    report = IndexingReport()
    for start in track(range(0, len(items), BATCH)):
        batch = items[start : start + BATCH]
        known = set() if update else writer.known([item.id for item in batch])
        report.known += len(known)
        batch = [item for item in batch if item.id not in known]
        if batch:
            began = time.perf_counter()
            places, embeddings = encode_readable(
                encoder, [(x.text, x.image) for x in batch], writer.layout.vectors, names=[x.id for x in batch]
            )
            report.encode_s += time.perf_counter() - began
            report.unreadable += [item.id for place, item in enumerate(batch) if place not in places]
            batch = [batch[place] for place in places]
        if batch:
            writer.add([item.id for item in batch], embeddings, [item.payload for item in batch], replace=update)
            report.added += len(batch)
    try:
        writer.compact()
    except BundleError:
        raise
    except (MetaEmbedError, OSError) as error:  # a disk with room for the items, but not for some of them twice
        log.warning("all is stored, but not merged into larger segments (%s); metaembed-index compact can later", error)
    return report
