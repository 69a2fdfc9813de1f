"""Texts and images to embeddings, from a bundle, without torch."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import layout
from .budget import Budget
from .errors import BundleError, UsageError
from .images import ImageRules, load_image, patchify
from .manifest import LANGUAGE, PROCESSOR, TOKENIZER, VISION, Bundle
from .processor import read_image_rules
from .session import Session
from .text import Side, Template, Tokenizer

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image"
Floats: TypeAlias = NDArray[np.float32]

DEFAULT_BATCH = 16
VISION_INPUTS = {field.name for field in fields(layout.VisionInputs)}
LANGUAGE_INPUTS = {field.name for field in fields(layout.LanguageInputs)} | {"image_embeddings"}
PADDED_TO = 16  # positions, where CUDA graphs are recorded: so that few shapes occur
CHUNK_ITEMS, CHUNK_BYTES = 512, 1 << 28  # inputs prepared at a time, so that a corpus never has to fit in memory
# Attention scores of one batch in float32, the largest activation of either graph; a session holds about four of them.
ACTIVATION_BYTES = 1 << 28


@dataclass(frozen=True)
class _Item:
    place: int
    prompt: NDArray[np.int64]
    grid: tuple[int, int] | None
    pixels: NDArray[np.float32] | None

    @property
    def windows(self) -> int:
        return layout.count_windows(self.grid) if self.grid else 0


class Encoder:
    """Encodes queries and candidates with a bundle's two graphs. A context manager: leaving it frees the sessions.

    ``encode_queries`` and ``encode_candidates`` take texts alone, images alone (paths or PIL images), or both, aligned
    item by item (None where an item lacks one), and return L2-normalised float32 in the order given.

    Args:
        pad_to: prompts of batches without images are padded to multiples of so many positions.
    """

    def __init__(self, bundle: Bundle, vision: Session, language: Session, *, pad_to: int = 1) -> None:
        self.bundle = bundle
        self._pad_to = pad_to
        self._vision, self._language = vision, language
        for name, session, inputs in ((VISION, vision, VISION_INPUTS), (LANGUAGE, language, LANGUAGE_INPUTS)):
            if set(session.inputs) != inputs:
                raise BundleError(f"{name} takes {', '.join(session.inputs)} instead of {', '.join(sorted(inputs))}")
        geometry = bundle.manifest.geometry
        self.dim = geometry.dim
        self.budgets = bundle.manifest.budgets
        self._rules: ImageRules = read_image_rules(bundle.path(PROCESSOR))
        self._tokenizer = Tokenizer(bundle.path(TOKENIZER), Template.from_json(bundle.manifest.template))

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True, threads: int = 0, cuda_graphs: bool = False) -> Encoder:
        """Open a bundle and the best session here. ``verify`` checks every SHA-256 first.

        ``cuda_graphs``: for a server of queries on an NVIDIA GPU, where launches bind a short query. What a batch of texts
        launches is recorded the second time that its shape comes, and replayed from then on; texts are padded to multiples
        of 16 tokens, so that shapes repeat. Use such an encoder from one thread at a time.

        Raises:
            UsageError, BundleError: no bundle, or a damaged one; CUDA graphs, and no NVIDIA GPU that runs it.
        """
        from .open_sessions import open_sessions

        bundle = Bundle.open(folder, verify=verify)
        sessions = open_sessions(bundle, (VISION, LANGUAGE), threads=threads, cuda_graphs=cuda_graphs)
        return cls(bundle, *sessions, pad_to=PADDED_TO if cuda_graphs else 1)

    @property
    def fingerprint(self) -> str:
        """Identifies model and preprocessing; an index remembers it."""
        return self.bundle.manifest.fingerprint

    @property
    def description(self) -> str:
        """What runs the graphs, and whether the bundle's parity was ever checked."""
        return self._language.description + (", unverified bundle" if self.bundle.unverified else "")

    def encode_queries(
        self,
        texts: Sequence[str | None] | None = None,
        *,
        images: Sequence[ImageSource | None] | None = None,
        budget: Budget | int | None = None,
        batch_size: int | None = None,
    ) -> Floats:
        """Embeddings (n, r_q, d) of queries; ``budget`` is r_q, by default the largest that the bundle serves."""
        return self._encode("query", texts, images, budget, batch_size)

    def encode_candidates(
        self,
        texts: Sequence[str | None] | None = None,
        *,
        images: Sequence[ImageSource | None] | None = None,
        budget: Budget | int | None = None,
        batch_size: int | None = None,
    ) -> Floats:
        """Embeddings (n, r_c, d) of candidates; ``budget`` is r_c, by default the largest that the bundle serves."""
        return self._encode("candidate", texts, images, budget, batch_size)

    def close(self) -> None:
        self._vision.close()
        self._language.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(
        self,
        side: Side,
        texts: Sequence[str | None] | None,
        images: Sequence[ImageSource | None] | None,
        budget: Budget | int | None,
        batch_size: int | None,
    ) -> Floats:
        vectors = self._vectors(side, budget)
        pairs = align_inputs(texts, images)
        if batch_size is not None and not (hasattr(batch_size, "__index__") and batch_size >= 1):
            raise UsageError(
                f"a batch of {batch_size!r} items is not possible; batch_size is a whole number, at least 1"
            )
        result = np.empty((len(pairs), vectors, self.dim), np.float32)
        for chunk in self._chunks(side, pairs):
            for batch in self._batches(chunk, self._batch_size(batch_size)):
                result[[item.place for item in batch]] = self._run(side, batch, vectors)
        return result

    def _batch_size(self, asked: int | None) -> int:
        """What was asked for, or the default, within what an engine's profiles allow."""
        limits = [limit for limit in (self._vision.max_items, self._language.max_items) if limit is not None]
        return min([asked or DEFAULT_BATCH, *limits])

    def _vectors(self, side: Side, budget: Budget | int | None) -> int:
        most: int = getattr(self.bundle.manifest.largest, side)
        asked = most if budget is None else getattr(budget, side) if isinstance(budget, Budget) else budget
        if isinstance(asked, bool) or not hasattr(asked, "__index__"):  # numpy's integers are welcome
            raise UsageError(f"a budget is a whole number of vectors or a Budget, not {asked!r}")
        asked = operator.index(asked)
        if not 1 <= asked <= most:
            raise UsageError(f"a budget of {asked} {side} vectors is outside 1..{most}, which this bundle serves")
        return asked

    def _chunks(self, side: Side, pairs: Sequence[tuple[str | None, ImageSource | None]]) -> Iterator[list[_Item]]:
        chunk: list[_Item] = []
        held = 0
        for place, (text, source) in enumerate(pairs):
            chunk.append(self._prepare(side, place, text, source))
            pixels = chunk[-1].pixels
            held += 0 if pixels is None else pixels.nbytes
            if len(chunk) == CHUNK_ITEMS or held > CHUNK_BYTES:
                yield chunk
                chunk, held = [], 0
        if chunk:
            yield chunk

    def _prepare(self, side: Side, place: int, text: str | None, source: ImageSource | None) -> _Item:
        limit = self.bundle.manifest.limits.text_tokens
        if source is None:
            return _Item(place, self._tokenizer.prompt_ids(text, 0, side, limit), None, None)
        patches = patchify(load_image(source), self._rules)
        prompt = self._tokenizer.prompt_ids(text, patches.tokens, side, limit)
        return _Item(place, prompt, patches.grid[1:], patches.pixels)

    def _batches(self, items: Sequence[_Item], batch_size: int) -> Iterator[list[_Item]]:
        """Group items of similar size, so that little is padding, within the memory for attention scores."""
        batch: list[_Item] = []
        for item in sorted(items, key=lambda item: (item.windows, len(item.prompt)), reverse=True):
            if batch and (len(batch) == batch_size or not self._fits(item, batch)):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _fits(self, item: _Item, batch: Sequence[_Item]) -> bool:
        """Whether an item may join: most of its windows are not padding, and the attention scores stay in bounds."""
        geometry, windows = self.bundle.manifest.geometry, batch[0].windows
        prompt = max(len(other.prompt) for other in (item, *batch))
        vision = geometry.vision.heads * (windows * layout.PATCHES) ** 2
        language = geometry.text.heads * (prompt + geometry.meta_tokens) ** 2
        return 2 * item.windows >= windows and 4 * (len(batch) + 1) * max(vision, language) <= ACTIVATION_BYTES

    def _run(self, side: Side, batch: Sequence[_Item], vectors: int) -> Floats:
        geometry = self.bundle.manifest.geometry
        seen = [(item.pixels, item.grid) for item in batch if item.pixels is not None and item.grid is not None]
        kind = self._language.inputs["image_embeddings"]
        embedded: NDArray[np.generic] = np.zeros((1, 1, geometry.text.hidden), kind)
        windows = 0
        if seen:
            inputs = layout.lay_out_images([pixels for pixels, _ in seen], [grid for _, grid in seen])
            windows = inputs.patches.shape[1]
            embedded = self._vision.run(inputs.feeds())["image_embeddings"]
        meta = (
            layout.query_meta_tokens(geometry.text.vocab, vectors)
            if side == "query"
            else layout.candidate_meta_tokens(geometry.text.vocab, geometry.query_tokens, vectors)
        )
        language = layout.lay_out_prompts(
            [item.prompt for item in batch],
            [item.grid for item in batch],
            meta,
            vectors,
            image_token=self._tokenizer.image_id,
            windows=windows,
            length=None if seen else self._padded(max(len(item.prompt) for item in batch)),
        )
        return self._language.run({**language.feeds(), "image_embeddings": embedded})["embeddings"]

    def _padded(self, length: int) -> int:
        """Positions for a longest prompt of ``length``, within what an engine's profiles allow."""
        most = self.bundle.manifest.limits.text_tokens + layout.TEMPLATE_TOKENS
        return max(length, min(-(-length // self._pad_to) * self._pad_to, most))


def align_inputs(
    texts: Sequence[str | None] | None, images: Sequence[ImageSource | None] | None
) -> list[tuple[str | None, ImageSource | None]]:
    """Pair texts and images item by item; a UsageError when the two lists differ in length."""
    if isinstance(texts, str) or isinstance(images, (str, os.PathLike, Image.Image)):
        raise UsageError("texts and images are lists; for one item give a list of one")
    if texts is None and images is None:
        raise UsageError("nothing to encode: give texts, images, or both")
    if not all(
        hasattr(given, "__getitem__") and hasattr(given, "__len__") for given in (texts, images) if given is not None
    ):
        raise UsageError(
            "texts and images are lists, whose items have an order; make one of a generator or a set by list(...)"
        )
    count = len(texts if texts is not None else images or ())
    texts, images = texts if texts is not None else [None] * count, images if images is not None else [None] * count
    if len(texts) != len(images):
        raise UsageError(f"{len(texts)} texts and {len(images)} images cannot be paired; use None where one is absent")
    return list(zip(texts, images, strict=True))
