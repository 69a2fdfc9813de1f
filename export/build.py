"""The public verb of this package's engine half: a bundle and a device in, engines or a device kit out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaembed.runtime.cuda import find_gpu
from metaembed.runtime.devices import Device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import Bundle, Manifest
from metaembed.runtime.staging import check_output

from .build_options import BuildOptions, chosen_engines
from .device_kit import build_command, write_device_kit
from .engine import build_engines, check_place
from .engine_process import Event
from .preflight import Preflight, check_planned, check_target
from .route import KIT, choose_route, installed_versions
from .savings import possible_changes


@dataclass(frozen=True)
class CheckedTarget:
    """A target that nothing known beforehand stands against: its ``route``, and for a kit its folder and the further
    ``words`` of the command to run there."""

    route: str
    preflight: Preflight
    kit: Path | None = None
    words: str = ""


@dataclass(frozen=True)
class BuildResult:
    """What came of it: ``record`` (build.json) of engines, or the ``kit``'s folder and the ``command`` to run there."""

    record: dict[str, Any] | None = None
    kit: Path | None = None
    command: str | None = None


def check_build(
    bundle: Bundle,
    device: Device,
    options: BuildOptions,
    *,
    output: Path | None = None,
    force: bool = False,
    swap: int = 0,
) -> CheckedTarget:
    """All checks of one target, before any work.

    Args:
        output: the folder of a kit.
        swap: bytes that a kit's device will have while it builds.

    Raises:
        UsageError: something that is known beforehand stands in the way; nothing has been done.
    """
    route, builder = _choose_builder(device, options.flavour)
    preflight = check_target(
        bundle,
        device,
        chosen_engines(bundle.manifest, options),
        **builder,
        swap=swap,
        changes=possible_changes(bundle.manifest, device, options),
    )
    if route == KIT:
        kit = _check_kit_folder(bundle.folder, device, output, force)
        return CheckedTarget(route, preflight, kit, _kit_words(bundle, options))
    if output:
        raise UsageError("engines are built into the bundle itself; -o is for a device kit")
    check_place(bundle, device, force=force)
    return CheckedTarget(route, preflight)


def build_target(
    bundle: Bundle,
    target: CheckedTarget,
    *,
    force: bool = False,
    on_event: Callable[[str, Event], None] = lambda engine, event: None,
) -> BuildResult:
    """Build a checked target's engines into the bundle, or write its kit where that is impossible here.

    Raises:
        MetaEmbedError: the builder failed; nothing is left but its log.
    """
    if target.kit is None:
        return BuildResult(record=build_engines(bundle, target.preflight, force=force, on_event=on_event))
    write_device_kit(bundle, target.preflight, target.kit, target.words, force=force)
    command = build_command(bundle, target.preflight.device, target.words)
    return BuildResult(kit=target.kit, command=command)


def check_before_export(manifest: Manifest, folder: Path, device: Device, *, force: bool = False) -> None:
    """Refuse what ``check_build``, with its defaults, would refuse of the bundle that ``folder`` will be.

    Args:
        manifest: the bundle's, as far as the request tells; of ``files`` the names count.

    Raises:
        UsageError: the target's builder is not installed, what it lacks, or why its kit cannot be written.
    """
    route, builder = _choose_builder(device, None)
    options = BuildOptions(budgets=manifest.budgets)
    changes = possible_changes(manifest, device, options)
    check_planned(manifest, device, chosen_engines(manifest, options), **builder, changes=changes)
    if route == KIT:
        _check_kit_folder(folder, device, None, force)


def _choose_builder(device: Device, asked: str | None) -> tuple[str, dict[str, Any]]:
    """The route to a device, and what a preflight must know of its builder."""
    gpu, installed = find_gpu(), installed_versions()
    route = choose_route(device, asked, gpu.capability if gpu else None, installed)
    if route == KIT:
        return route, {"flavour": "tensorrt", "version": None, "builds_here": False}
    return route, {"flavour": route, "version": installed.get(route), "builds_here": True}


def _check_kit_folder(bundle: Path, device: Device, output: Path | None, force: bool) -> Path:
    """The kit's folder, by default beside the bundle's; a UsageError where a kit cannot be written."""
    own = Path(os.path.abspath(bundle))
    kit = output or own.with_name(f"{own.name}-kit-{device.name}")
    if kit.resolve().is_relative_to(own.resolve()):
        raise UsageError(f"{kit} is the bundle, or lies in it; give the kit another folder with -o")
    check_output(kit, force=force)
    return kit


def _kit_words(bundle: Bundle, options: BuildOptions) -> str:
    own = set(options.budgets) == set(bundle.manifest.budgets)
    budgets = [] if own else [f"--budget {budget}" for budget in options.budgets]
    return " ".join(word for word in (*budgets, options.words()) if word)
