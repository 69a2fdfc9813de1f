"""Run the calibration set through the runtime's own encoder and watch the inputs of every group of Linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from metaembed.runtime.encoder import Encoder
from metaembed.runtime.errors import BundleError
from metaembed.runtime.manifest import LANGUAGE, VISION, Bundle
from metaembed.runtime.session import Arrays

from .dataset import CalibrationItem
from .linears import Group
from .observers import TensorObserver
from .sessions import ExactSession

Array = NDArray[Any]
Progress = Callable[[Any], Iterable[Any]]


class Watcher:
    """Feeds each group's input, padding left out, to the group's observer.

    Args:
        divisors: what smoothing will divide the channels of a group's input by, by group.
    """

    def __init__(self, groups: Sequence[Group], divisors: Mapping[str, Array], seed: int) -> None:
        self._groups = {(group.graph, str(group.input.name)): group for group in groups}
        self._divisors = divisors
        self.observers = {
            group.name: TensorObserver(int(group.linears[0].stored.shape[1]), crc32(group.name.encode()) + seed)
            for group in groups
        }
        self.origin = ""

    def names(self, graph: str) -> list[str]:
        """The tensors of a graph to watch."""
        return [name for where, name in self._groups if where == graph]

    def tap(self, graph: str) -> Callable[[str, Array, Arrays], None]:
        def watch(name: str, values: Array, feeds: Arrays) -> None:
            group = self._groups[graph, name]
            rows = values.reshape(-1, values.shape[-1])
            rows = rows[real_rows(feeds, len(rows))]
            if not np.isfinite(rows).all():
                raise BundleError(f"{self.origin} gives NaN or infinity before {group.name}; nothing can be scaled")
            divisor = self._divisors.get(group.name)
            self.observers[group.name].add(rows if divisor is None else rows / divisor)

        return watch


def real_rows(feeds: Arrays, count: int) -> Array:
    """Which of ``count`` rows of an inner tensor are real, not padding: (count,) of bool.

    Rows are patches, units of four patches, positions, or (after the last layer's gather) answers, which are all real.
    """
    mask = np.asarray(feeds["patch_mask"] if "patch_mask" in feeds else feeds["mask"]).reshape(-1)
    if count == mask.size:
        return mask
    if "patch_mask" in feeds and mask.size % count == 0:
        return mask.reshape(count, -1).any(axis=1)
    return np.ones(count, np.bool_)


def observe(
    bundle: Bundle,
    graphs: Mapping[str, ir.Model],
    groups: Sequence[Group],
    items: Sequence[CalibrationItem],
    *,
    divisors: Mapping[str, Array] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = iter,
) -> dict[str, TensorObserver]:
    """An observer per group, having seen every item at the bundle's largest budget (which contains all smaller ones).

    Args:
        graphs: the float32 graphs to run; their weights lie in the bundle.

    Raises:
        BundleError: an activation is NaN or infinite; the item and the place are named.
    """
    watcher = Watcher(groups, divisors or {}, seed)
    sessions = [
        ExactSession(graphs[name], bundle.folder, taps=watcher.names(name), tap=watcher.tap(name), threads=threads)
        for name in (VISION, LANGUAGE)
    ]
    with Encoder(bundle, *sessions) as encoder:
        for item in progress(items):
            watcher.origin = item.origin
            encode_item(encoder, item)
    return watcher.observers


def encode_item(encoder: Encoder, item: CalibrationItem) -> NDArray[np.float32]:
    """Embeddings (1, r, d) of one item at the bundle's largest budget, by itself: nothing is padded to a neighbour."""
    encode = encoder.encode_queries if item.side == "query" else encoder.encode_candidates
    return encode([item.text], images=[item.image])


def count_multiplies(groups: Iterable[Group], observers: Mapping[str, TensorObserver]) -> dict[str, int]:
    """Multiply-adds of each group over the calibration set."""
    return {group.name: group.size * observers[group.name].rows_seen for group in groups}
