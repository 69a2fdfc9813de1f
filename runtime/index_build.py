"""From items to an index: encode those that the index does not hold yet, and append them batch by batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .encoder import Encoder
from .errors import BundleError, MetaEmbedError, UsageError
from .index import Index
from .index_layout import Layout
from .index_writer import IndexWriter
from .items import Item
from .manifest import MANIFEST
from .readable import encode_readable
from .unicode import is_unicode

log = logging.getLogger(__name__)
BATCH = 64  # items encoded and made durable together: what a kill can cost


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


def open_writer(
    encoder: Encoder, folder: Path, *, resume: bool, storage: str | None, screen: bool, vectors: int | None
) -> IndexWriter:
    """Create an index for an encoder, or open one that the same model began; what is None is the index's own.

    Raises:
        UsageError: the folder exists and `resume` is false, or another model or layout filled it.
    """
    largest = encoder.bundle.manifest.largest.candidate
    bundle = str(Path(encoder.bundle.folder).absolute())
    if vectors is not None and not 1 <= vectors <= largest:
        raise UsageError(f"{vectors} vectors per item were asked for; this bundle gives 1 to {largest}")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not resume or empty:
        if not empty:
            raise UsageError(f"{folder} exists; give --resume to continue or extend it, or another folder with -o")
        ends = [budget.candidate for budget in encoder.budgets]
        layout = Layout.for_vectors(encoder.dim, vectors or largest, storage or "bf16", ends, screen=screen)
        Index.create(folder, layout, fingerprint=encoder.fingerprint, bundle=bundle)
    writer = IndexWriter(folder)
    try:
        check_model(encoder, writer.about.get("fingerprint", ""), folder)
        _check_layout(writer.layout, folder, storage=storage, screen=screen, vectors=vectors, largest=largest)
        if bundle != writer.about.get("bundle"):  # it was moved
            writer.set_bundle(bundle)
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


def find_bundle(index: Index, given: Path | None) -> Path:
    """The bundle of an index's model: the one given, or where it was at indexing.

    Raises:
        UsageError: it is no longer there, or the index does not say where it was.
    """
    if given is None and not index.bundle:
        raise UsageError(f"{index.folder} does not name the bundle that it was made with; say where by --bundle DIR")
    if given is None and not (Path(index.bundle) / MANIFEST).is_file():
        raise UsageError(
            f"{index.folder} was made with {index.bundle}, which is no longer there; say where by --bundle DIR"
        )
    return given or Path(index.bundle)


def check_model(encoder: Encoder, fingerprint: str, folder: Path) -> None:
    """Refuse a bundle whose vectors cannot be compared with those in the index."""
    if not fingerprint:
        raise UsageError(f"{folder} does not say which model its vectors are of; no bundle's can be compared with them")
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
        known = set() if update else writer.known([item.id for item in batch if is_unicode(item.id)])
        report.known += len(known)
        batch = [item for item in batch if item.id not in known]
        if batch:
            began = time.perf_counter()
            places, embeddings = encode_readable(
                encoder.encode_candidates,
                [(item.text, item.image) for item in batch],
                writer.layout.vectors,
                names=[item.id for item in batch],
            )
            report.encode_s += time.perf_counter() - began
            report.unreadable += [item.id for place, item in enumerate(batch) if place not in places]
            batch = [batch[place] for place in places]
        if batch:
            writer.add([item.id for item in batch], embeddings, [item.payload for item in batch], replace=update)
            report.added += len(batch)
    try:
        writer.tidy()
    except BundleError:
        raise
    except (MetaEmbedError, OSError) as error:  # a disk with room for the items, but not for some of them twice
        log.warning("all is stored, but not merged into larger segments (%s); metaembed-index compact can later", error)
    return report
