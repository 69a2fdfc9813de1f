"""How a target gets its engines: built here by TensorRT, built here ahead of time by TensorRT-RTX, or a kit that goes there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping

from metaembed.runtime.cuda import Cuda, find_gpu
from metaembed.runtime.devices import Capability, Device, devices_of, find_device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.memory import GIB
from metaembed.runtime.session_trt import FLAVOURS, installed_flavours

KIT = "kit"
ROUTES = ("tensorrt", "tensorrt_rtx", KIT)


def installed_versions() -> dict[str, str]:
    """Flavour -> version of each TensorRT that is installed here.

    Nothing is imported where metadata tells: Python 3.10 knows a package only by its top_level.txt, which not every installer
    writes, and a system's package need not have any.
    """
    packages = importlib.metadata.packages_distributions()
    if all(flavour in packages or not importlib.util.find_spec(flavour) for flavour in FLAVOURS):
        return {name: importlib.metadata.version(packages[name][0]) for name in FLAVOURS if name in packages}
    return installed_flavours()


def choose_route(device: Device, asked: str | None, here: Capability | None, installed: Mapping[str, str]) -> str:
    """``tensorrt`` on the device itself, else ``tensorrt_rtx`` where it reaches the target, else a ``kit``.

    Args:
        asked: the user's own choice, or None.
        here: compute capability of this machine's GPU, None where there is none.
        installed: flavour -> version.

    Raises:
        UsageError: the route asked for does not exist, or the package that it needs is not installed.
    """
    if asked is not None and asked not in ROUTES:
        raise UsageError(f"there is no flavour {asked!r}; known: {', '.join(ROUTES)}")
    on_device = here == device.capability
    if asked == "tensorrt" and not on_device:
        found = "no GPU" if here is None else f"compute capability {here[0]}.{here[1]}"
        raise UsageError(
            f"TensorRT builds on the target itself ({device.title}, compute capability {device.capability_text}), and "
            f"this machine has {found}; --flavour kit makes a folder that builds there"
        )
    natural = "tensorrt" if on_device and "tensorrt" in installed else "tensorrt_rtx" if device.builds_ahead else KIT
    if on_device and natural == KIT:
        natural = "tensorrt"
    route = asked or natural
    if route != KIT and route not in installed:
        raise UsageError(f"{route} is not installed for {sys.executable}; {_installation(route, device)}")
    return route


def _installation(flavour: str, device: Device) -> str:
    if flavour == "tensorrt_rtx":
        return "pip install 'metaembed-export[tensorrt-rtx]'"
    if device.jetpacks:
        return "on a Jetson it comes with JetPack: make the environment with python3 -m venv --system-site-packages"
    return "pip install 'metaembed-export[tensorrt]'"


def device_here() -> Device:
    """The table's row for this machine's GPU: of its compute capability, the one whose memory is nearest.

    Raises:
        UsageError: there is no GPU here, or the table does not name its kind.
    """
    gpu = find_gpu()
    if gpu is None:
        raise UsageError("this machine has no NVIDIA GPU; name what to build for, for example --target a100")
    return _nearest_row(gpu)


def _nearest_row(gpu: Cuda) -> Device:
    rows = devices_of(gpu.capability)
    if not rows:
        major, minor = gpu.capability
        raise UsageError(f"{gpu.name} (compute capability {major}.{minor}) is not in the device table; name a --target")
    return min(rows, key=lambda row: abs(row.memory_gib - gpu.memory_bytes / GIB))


def find_targets(names: list[str] | None) -> list[Device]:
    """The devices that ``--target`` names, each once, or this machine's own when it was left out.

    Raises:
        UsageError: a device that the table does not have, or several in one word.
    """
    if not names:
        return [device_here()]
    for name in names:
        if "," in name:
            each = " ".join(f"--target {part.strip()}" for part in name.split(",") if part.strip())
            raise UsageError(f"--target {name!r} is not one device; repeat --target: {each or '--target a100'}")
    return list(dict.fromkeys(find_device(name) for name in names))
