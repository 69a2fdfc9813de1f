"""What runs a graph: a session takes named arrays and returns named arrays, whatever the engine behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .device_buffers import DeviceArray

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """``run(feeds) -> outputs`` over ONNX Runtime or TensorRT. Outputs belong to the caller."""

    @property
    def description(self) -> str:
        """What really runs the graph, for people: ``ONNX Runtime 1.20.1 (CPUExecutionProvider)``."""

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        """Name and type of each input."""

    @property
    def max_items(self) -> int | None:
        """The most items in one run; None where there is no limit."""

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; shapes may differ from call to call."""

    def close(self) -> None:
        """Free memory; the session cannot run again."""


@runtime_checkable
class DeviceSession(Session, Protocol):
    """A session with memory of its own, in which inputs can stay between runs."""

    def most_items(self, name: str, item: tuple[int, ...]) -> int:
        """The most items of this shape in one run of an input, which may be more than ``max_items``, of any shape."""

    def place(self, values: NDArray[Any]) -> DeviceArray:
        """A copy in the device's memory, to feed any number of times; whoever asked for it frees it."""
