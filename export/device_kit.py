"""A folder for a device whose engines can only be built on it: the bundle, this package, a pinned recipe, one command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaembed.runtime.devices import Device
from metaembed.runtime.golden import SIDES, golden_path
from metaembed.runtime.manifest import MANIFEST, Bundle, record_files, save_manifest
from metaembed.runtime.staging import staged_folder
from metaembed.runtime.weights import place_file

from .device_recipe import RECIPE, REQUIREMENTS, make_recipe
from .device_wheel import write_device_wheel
from .preflight import KIT_TENSORRT, Preflight

KIT_RECORD, SUMS = "kit.json", "SHA256SUMS"

# Versions that have wheels for Python 3.10 to 3.12 on x86-64 and aarch64 (resolved for both JetPack Pythons). They are all: what
# tokenizers names beside, huggingface_hub and ten more, it imports only to download, so pip is told to install no others.
PINS = (
    "ml-dtypes==0.5.4",
    "numpy==2.2.6",
    "pillow==11.3.0",
    "polygraphy==0.53.6",
    "safetensors==0.6.2",
    "tokenizers==0.21.4",
    "tqdm==4.67.1",
)
# For a device that is no Jetson and has no TensorRT of its own; x86-64, since this version has no aarch64 bindings for CUDA 12.
TENSORRT_PINS = (
    "nvidia-cuda-runtime-cu12==12.9.79",
    f"tensorrt-cu12=={KIT_TENSORRT}",
    f"tensorrt-cu12-bindings=={KIT_TENSORRT}",
    f"tensorrt-cu12-libs=={KIT_TENSORRT}",
)


def write_device_kit(bundle: Bundle, preflight: Preflight, output: Path, options: str, *, force: bool = False) -> Path:
    """Write the kit; returns its folder. Weights are hard-linked where the disk allows, so it costs little here.

    Args:
        options: further words for metaembed-build on the device, such as ``--layout separate``.

    Raises:
        UsageError: the output exists and is no kit or bundle, or ``force`` is off.
    """
    device = preflight.device
    with staged_folder(output, force=force) as folder:
        own = {name: record for name, record in bundle.manifest.files.items() if not name.startswith("engines/")}
        for name in own:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            place_file(bundle.folder / name, folder / name)
        save_manifest(folder, replace(bundle.manifest, files=own))
        wheel = write_device_wheel(folder)
        requirements = PINS if device.jetpacks else (*PINS, *TENSORRT_PINS)
        (folder / REQUIREMENTS).write_text("\n".join(requirements) + "\n", encoding="utf-8")
        command = build_command(bundle, device, options)
        (folder / KIT_RECORD).write_text(json.dumps(describe_kit(device, command), indent=2) + "\n", encoding="utf-8")
        recipe = make_recipe(preflight, command, wheel.name, SUMS, golden=has_golden(bundle))
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
        others = record_files(folder, (MANIFEST, KIT_RECORD, RECIPE, REQUIREMENTS, wheel.name))
        sums = "".join(f"{record.sha256}  {name}\n" for name, record in sorted({**own, **others}.items()))
        (folder / SUMS).write_text(sums, encoding="utf-8")  # in the format of sha256sum
    return output


def build_command(bundle: Bundle, device: Device, options: str = "") -> str:
    """The one command that a device runs inside the kit. It insists on the device's own TensorRT: anywhere else it is
    refused, where the best route would be a kit of the kit. Without golden vectors only the files are checked."""
    words = f"metaembed-build . --target {device.name} --flavour tensorrt {options}".strip()
    return f"{words} && metaembed-check ." + ("" if has_golden(bundle) else " --structure")


def has_golden(bundle: Bundle) -> bool:
    """Whether there is something to compare a device's embeddings with: a bundle exported without parity has nothing."""
    return all(golden_path(side) in bundle.manifest.files for side in SIDES)


def describe_kit(device: Device, command: str) -> dict[str, Any]:
    """kit.json: what the kit is for, and how it is built there. The hashes to expect are in SHA256SUMS."""
    return {
        "format": "metaembed-kit",
        "format_version": 1,
        "target": device.name,
        "compute_capability": list(device.capability),
        "jetpacks": [{"version": pack.version, "tensorrt": pack.tensorrt} for pack in device.jetpacks],
        "command": command,
    }
