"""What of an index fits where: the first vectors of every item, group by group, in memory or beside the model on a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .cost import BYTES
from .devices import Device, find_device
from .errors import UsageError
from .index import Index
from .index_build import find_bundle
from .manifest import Bundle, Manifest
from .memory import GIB
from .plan import make_plan
from .plan_device import fit_device
from .plan_report import table


@dataclass(frozen=True)
class GroupSize:
    """A group of an index, by the first vectors of an item that end with it: bytes over all stored items, of the group alone,
    of all vectors up to there as stored, and of those in the model's precision, as a GPU keeps them (None: not asked).
    """

    vectors: int
    group_bytes: int
    hold_bytes: int
    place_bytes: int | None


@dataclass(frozen=True)
class IndexFit:
    """Groups, smallest first, and how many first vectors of every item fit into ``memory_gib`` of memory (``hold``) and into
    what a model leaves of a GPU, ``room_gib`` (``place``): 0 where not even the first group does, None where it was not asked.
    """

    groups: tuple[GroupSize, ...]
    memory_gib: float | None
    device: str | None
    room_gib: float | None

    @property
    def hold(self) -> int | None:
        return _most({group.vectors: group.hold_bytes for group in self.groups}, self.memory_gib)

    @property
    def place(self) -> int | None:
        return _most({group.vectors: group.place_bytes or 0 for group in self.groups}, self.room_gib)

    def to_json(self) -> dict[str, Any]:
        return {"groups": [asdict(group) for group in self.groups], "hold": self.hold, "place": self.place}

    def describe(self) -> str:
        """A table of the groups, and a sentence for each question."""
        head = ["first vectors", "GiB of the group", "GiB to hold"]
        rows = [[f"{size.vectors}", _gib(size.group_bytes), _gib(size.hold_bytes)] for size in self.groups]
        if self.device:
            head.append("GiB to place")
            rows = [[*row, _gib(size.place_bytes or 0)] for row, size in zip(rows, self.groups, strict=True)]
        lines = [table(head, rows)]
        if self.memory_gib is not None:
            lines.append(
                f"{self.memory_gib:g} GiB of memory: " + (f"--hold {self.hold}" if self.hold else "none of these fit")
            )
        if self.room_gib is not None:
            how = f"--place {self.place}, for a first stage of R_Q,{self.place}" if self.place else "none of these fit"
            lines.append(f"{self.device}, {self.room_gib:.3f} GiB beside the model: {how}")
        return "\n".join(lines)


def fit_index(
    index: Index, *, memory_gib: float | None = None, device: str | None = None, bundle: Path | None = None
) -> IndexFit:
    """What fits into so much memory, and beside the index's model on a device of the table.

    Raises:
        UsageError: no such amount or device, the bundle is not there, or the device cannot run it.
    """
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise UsageError(f"{memory_gib} GiB of memory make no sense; it has to be above 0")
    if device is None:
        return IndexFit(measure_groups(index), memory_gib, None, None)
    found = find_device(device)
    manifest = Bundle.open(find_bundle(index, bundle), verify=False).manifest
    groups = measure_groups(index, manifest.precision)
    return IndexFit(groups, memory_gib, found.title, room_beside(manifest, found) / GIB)


def measure_groups(index: Index, precision: str | None = None) -> tuple[GroupSize, ...]:
    """All groups of an index, smallest first. Deleted items count until they are compacted away."""
    items, layout = sum(part.segment.items for part in index.snapshot().parts), index.layout
    sizes: list[GroupSize] = []
    for group, end in enumerate(layout.ends, start=1):
        held = items * replace(layout, ends=layout.ends[:group], screen=False).item_bytes
        placed = items * end * layout.dims * BYTES[precision] if precision else None
        sizes.append(GroupSize(end, held - (sizes[-1].hold_bytes if sizes else 0), held, placed))
    return tuple(sizes)


def room_beside(manifest: Manifest, device: Device) -> int:
    """Bytes that a bundle leaves free on a device, by the arithmetic of `fit_device`; a UsageError where it does not run there."""
    quantization = manifest.quantization["type"] if manifest.quantization else None
    plan = make_plan(
        manifest.model, manifest.geometry, manifest.budgets, 1, max_image_tokens=manifest.limits.image_tokens
    )
    fit = fit_device(plan, device, manifest.precision, quantization)
    if fit.precision is None:
        lack = f"lacks {_gib(-fit.left_bytes)} GiB" if fit.left_bytes < 0 else "has no hardware for its arithmetic"
        raise UsageError(f"{device.title} does not run the index's model: it {lack}")
    return fit.left_bytes


def _most(sizes: dict[int, int], room_gib: float | None) -> int | None:
    if room_gib is None:
        return None
    return max((vectors for vectors, size in sizes.items() if size <= room_gib * GIB), default=0)


def _gib(size: int) -> str:
    return f"{size / GIB:,.3f}"
