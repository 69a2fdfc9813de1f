"""A folder for a device whose engines can only be built on it: the bundle, this package, a pinned recipe, one command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaembed.runtime.devices import Device
from metaembed.runtime.golden import SIDES, golden_path
from metaembed.runtime.manifest import MANIFEST, Bundle, FileRecord
from metaembed.runtime.staging import staged_folder
from metaembed.runtime.weights import place_file

from .device_wheel import write_device_wheel
from .memory import gib
from .memory_check import swap_needed
from .preflight import KIT_TENSORRT, Preflight

KIT_RECORD, RECIPE, REQUIREMENTS = "kit.json", "BUILD.md", "requirements.txt"

# Versions that have wheels for Python 3.10 to 3.12 on x86-64 and aarch64 (resolved for both JetPack Pythons).
PINS = (
    "ml-dtypes==0.5.4",
    "numpy==2.2.6",
    "pillow==11.3.0",
    "polygraphy==0.53.6",
    "safetensors==0.6.2",
    "tokenizers==0.21.4",
    "tqdm==4.67.1",
)
VERIFIED = (
    "The last line builds the engines and replays the golden vectors on them; it exits with 1 when they disagree.",
    "Nothing about speed or accuracy on this device has been measured before that.",
)
UNVERIFIED = (
    "Nothing was verified: the bundle was exported without parity (--no-parity) and has no golden vectors. The last line",
    "builds the engines and checks files only; it says nothing about accuracy. Export again to have embeddings compared.",
)
# For a device that is no Jetson and has no TensorRT of its own.
TENSORRT_PIN = f"tensorrt-cu12=={KIT_TENSORRT}"


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
        manifest = json.dumps(replace(bundle.manifest, files=own).to_json(), indent=2) + "\n"
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        wheel = write_device_wheel(folder)
        requirements = PINS if device.jetpacks else (*PINS, TENSORRT_PIN)
        (folder / REQUIREMENTS).write_text("\n".join(requirements) + "\n", encoding="utf-8")
        record = describe_kit(device, build_command(bundle, device, options), folder, wheel)
        (folder / KIT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        recipe = write_recipe(preflight, record, wheel.name, golden=has_golden(bundle))
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    return output


def build_command(bundle: Bundle, device: Device, options: str = "") -> str:
    """The one command that a device runs inside the kit. It insists on the device's own TensorRT: anywhere else it is
    refused, where the best route would be a kit of the kit. Without golden vectors only the files are checked."""
    words = f"metaembed-build . --target {device.name} --flavour tensorrt {options}".strip()
    return f"{words} && metaembed-check ." + ("" if has_golden(bundle) else " --structure")


def has_golden(bundle: Bundle) -> bool:
    """Whether there is something to compare a device's embeddings with: a bundle exported without parity has nothing."""
    return all(golden_path(side) in bundle.manifest.files for side in SIDES)


def describe_kit(device: Device, command: str, folder: Path, wheel: Path) -> dict[str, Any]:
    """kit.json: what the kit is for and the hashes to expect; those of graphs and weights are in bundle.json."""
    return {
        "format": "metaembed-kit",
        "format_version": 1,
        "target": device.name,
        "compute_capability": list(device.capability),
        "jetpacks": {pack.version: pack.tensorrt for pack in device.jetpacks},
        "command": command,
        "files": {
            name: {"bytes": record.bytes, "sha256": record.sha256}
            for name, record in ((name, FileRecord.of(folder / name)) for name in (MANIFEST, wheel.name, REQUIREMENTS))
        },
    }


def write_recipe(preflight: Preflight, record: dict[str, Any], wheel: str, *, golden: bool) -> str:
    """BUILD.md: what the board must have, three lines to prepare it, and the command."""
    device, estimate = preflight.device, preflight.estimate
    vectors = "golden vectors, " if golden else ""
    site = " --system-site-packages" if device.jetpacks else ""
    lines = [
        f"# Build and check on {device.title}",
        "",
        f"This folder is complete: graphs, weights, tokenizer, {vectors}and `{wheel}` with the two commands.",
        "",
        *_system_lines(device),
        f"- Memory: about {gib(estimate.build_peak)} while building (an estimate), {gib(estimate.serving)} while serving.",
        f"- Disk: about {gib(estimate.plans)} for the plans.",
        "",
        *_swap_lines(swap_needed(device, estimate)),
        "```sh",
        f"python3 -m venv{site} .venv && . .venv/bin/activate",
        f"pip install -r {REQUIREMENTS}",
        f"pip install --no-deps ./{wheel}",
        str(record["command"]),
        "```",
        "",
        *(VERIFIED if golden else UNVERIFIED),
        "",
    ]
    return "\n".join(lines)


def _swap_lines(amount: int) -> list[str]:
    """How to give the board the swap that its build needs; nothing where it needs none."""
    if not amount:
        return []
    return [
        f"The build needs {amount} GiB of swap, which the board may be given by:",
        "",
        "```sh",
        f"sudo fallocate -l {amount}G /swapfile && sudo chmod 600 /swapfile",
        "sudo mkswap /swapfile && sudo swapon /swapfile",
        "```",
        "",
    ]


def _system_lines(device: Device) -> list[str]:
    if not device.jetpacks:
        return ["- System: Linux with an NVIDIA driver for CUDA 12 and Python 3.10 to 3.12."]
    return [
        f"- JetPack {pack.version}: TensorRT {pack.tensorrt}, CUDA {pack.cuda}, Python {pack.python}."
        for pack in device.jetpacks
    ]
