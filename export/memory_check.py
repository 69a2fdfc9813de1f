"""Whether a build and what it serves fit the memory of a machine, and what to do where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

from metaembed.runtime.devices import Device
from metaembed.runtime.memory import GIB, available_memory

from .memory import Estimate, estimate_build, gib
from .savings import EXPORT, Change, advise

# The share of an integrated device's memory that the operating system leaves (a Jetson reports 61.3 of 64 GiB).
USABLE = 0.9


@dataclass(frozen=True)
class MemoryCheck:
    """The circumstances of a request.

    Args:
        builds_here: whether this machine builds; its own memory is measured, with its swap.
        swap: bytes that another device will have while it builds.
        changes: to the request, to be proposed where memory does not suffice.
        step: the step that asks, ``EXPORT`` or ``BUILD``.
    """

    builds_here: bool
    swap: int
    changes: Iterable[list[Change]]
    step: str

    def problems(self, device: Device, flavour: str, estimate: Estimate) -> Iterator[str]:
        """A sentence where the engines cannot be served, or else not be built."""

        def changed(change: Change) -> Estimate:
            return estimate_build(change.manifest, change.engines, flavour, unified=device.integrated)

        usable = usable_memory(device)
        if estimate.serving > usable:
            advice = advise(
                self.changes, lambda change: changed(change).serving, estimate.serving, usable, at=self.step
            )
            yield f"serving takes about {gib(estimate.serving)} and {device.title} has {gib(usable)}; {advice}"
            return
        limit = self._build_limit(device, flavour)
        if limit is not None and estimate.build_peak > limit:
            where = "this machine" if self.builds_here else device.title
            free = "free, swap included" if self.builds_here else f"with {gib(self.swap)} of swap" if self.swap else ""
            advice = advise(
                self.changes,
                lambda change: changed(change).build_peak,
                estimate.build_peak,
                limit,
                at=self.step,
                swap=self._swap_advice(device, estimate, limit),
            )
            yield (
                f"the build takes about {gib(estimate.build_peak)} and {where} has {gib(limit)} {free}".rstrip()
                + f"; {advice}"
            )

    def _build_limit(self, device: Device, flavour: str) -> int | None:
        """None where it is not known: a server's own memory, or a system that does not say."""
        if self.builds_here:
            return available_memory(swap=True)
        return usable_memory(device) + self.swap if flavour == "tensorrt" and device.integrated else None

    def _swap_advice(self, device: Device, estimate: Estimate, limit: int) -> str:
        if self.builds_here:
            return f"add {ceil((estimate.build_peak - limit) / GIB)} GiB of swap"
        flag = f"--swap {swap_needed(device, estimate)}"
        where = (
            f"export without --target and run metaembed-build with {flag}" if self.step == EXPORT else f"give {flag}"
        )
        return f"{where}, when the device will have that many GiB of swap"


def usable_memory(device: Device) -> int:
    """Bytes that the operating system leaves on a device: of one memory for CPU and GPU, or of a card's own."""
    return int(device.memory_gib * GIB * (USABLE if device.integrated else 1.0))


def swap_needed(device: Device, estimate: Estimate) -> int:
    """GiB of swap without which a device that has one memory does not hold the build."""
    return max(0, ceil((estimate.build_peak - usable_memory(device)) / GIB)) if device.integrated else 0
