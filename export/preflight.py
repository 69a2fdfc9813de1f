"""Say no before any work: target x TensorRT x precision x quantisation x opset x memory, from the manifest alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from metaembed.runtime.devices import DEVICES, FIRST_CAPABILITY, FIRST_TENSORRT, Device
from metaembed.runtime.errors import UsageError
from metaembed.runtime.manifest import DEFAULT_OPSET, LANGUAGE, VISION, Bundle, Manifest

from .memory import Estimate, estimate_build, gib
from .memory_check import MemoryCheck
from .onnx_header import read_opset
from .profiles import EngineSpec, Profile
from .savings import BUILD, EXPORT, Change

FLAVOURS = ("tensorrt", "tensorrt_rtx")
OLDEST_TENSORRT, OLDEST_RTX = "10.3", "1.2"
# The newest opset that the ONNX parser of a release takes (docs/operators.md of each release of onnx/onnx-tensorrt).
PARSER_OPSETS = (("10.0", 20), ("10.15", 24))
RTX_OPSET = 24
# What a kit installs on a device that is no Jetson: it parses every opset we write.
KIT_TENSORRT = "10.15.1.29"
# 1.7.1 for 8.0: "Attention operation was not supported by a dedicated kernel"
FLOAT32_ATTENTION = (
    "TensorRT-RTX has no kernel for an Attention operator in fp32; "
    f"export with --precision bf16, or --opset {DEFAULT_OPSET}"
)


@dataclass(frozen=True)
class Preflight:
    """What will be built, with what, for what, and what it is expected to take. Made by the checks below only."""

    device: Device
    flavour: str
    version: str | None
    engines: tuple[EngineSpec, ...]
    estimate: Estimate

    @classmethod
    def of(
        cls, manifest: Manifest, device: Device, engines: tuple[EngineSpec, ...], flavour: str, version: str | None
    ) -> Preflight:
        """Not checked yet."""
        estimate = estimate_build(manifest, engines, flavour, unified=device.integrated)
        return cls(device, flavour, version, engines, estimate)

    def table(self) -> str:
        """For people: the target, a line for each engine and profile, and the expected memory."""
        version = f" {self.version}" if self.version else ""
        lines = [
            f"target    {self.device.title}, compute capability {self.device.capability_text}, {self.flavour}{version}"
        ]
        for engine in self.engines:
            lines.append(f"engine    {engine.name}.plan from {engine.graph}")
            for profile in engine.profiles:
                lines.append(f"  profile {profile.name}, min-opt-max: {_spans(profile)}")
        estimate = self.estimate
        lines.append(
            f"estimate  plans {gib(estimate.plans)}, build {gib(estimate.build_peak)} of memory, "
            f"serving {gib(estimate.serving)} ({gib(estimate.activations)} of it activations)"
        )
        return "\n".join(lines)


def check_target(
    bundle: Bundle,
    device: Device,
    engines: tuple[EngineSpec, ...],
    *,
    flavour: str,
    version: str | None,
    builds_here: bool = True,
    swap: int = 0,
    changes: Iterable[list[Change]] = (),
) -> Preflight:
    """Check all that can be known before a builder starts.

    Args:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the TensorRT that will build, None when it is not known yet (a device kit).
        builds_here: whether this machine's memory and disk are the ones that matter.
        swap: bytes that a kit's device will have while it builds; this machine's own is measured.
        changes: to the request, to be proposed where memory does not suffice.

    Raises:
        UsageError: at least one reason why this cannot work, each with what to do instead.
    """
    opsets = {engine.graph: read_opset(bundle.path(engine.graph)) for engine in engines}
    preflight = Preflight.of(bundle.manifest, device, engines, flavour, version)
    _refuse(
        *_problems(preflight, bundle.manifest, opsets, MemoryCheck(builds_here, swap, changes, BUILD)),
        *(_disk_problems(bundle.folder, preflight.estimate) if builds_here else ()),
    )
    return preflight


def check_planned(
    manifest: Manifest,
    device: Device,
    engines: tuple[EngineSpec, ...],
    *,
    flavour: str,
    version: str | None,
    builds_here: bool = True,
    changes: Iterable[list[Change]] = (),
) -> Preflight:
    """``check_target`` before the export: of a bundle that will have this manifest, all but the disk, which it fills itself.

    Raises:
        UsageError: at least one reason why its engines could not be built, each with what to do instead.
    """
    preflight = Preflight.of(manifest, device, engines, flavour, version)
    opsets = dict.fromkeys((LANGUAGE, VISION), manifest.opset)
    _refuse(*_problems(preflight, manifest, opsets, MemoryCheck(builds_here, 0, changes, EXPORT)))
    return preflight


def _problems(
    preflight: Preflight, manifest: Manifest, opsets: Mapping[str, int], memory: MemoryCheck
) -> Iterator[str]:
    device, flavour, version = preflight.device, preflight.flavour, preflight.version
    yield from _type_problems(manifest, device)
    yield from _version_problems(device, flavour, version)
    yield from _opset_problems(manifest, opsets, device, flavour, version)
    yield from memory.problems(device, flavour, preflight.estimate)


def _refuse(*problems: str) -> None:
    if problems:
        raise UsageError("; ".join(problems))


def check_types(device: Device, precision: str, quantization: str | None = None) -> None:
    """Refuse a precision or quantisation that a device has no hardware for, before anything is exported or calibrated.

    Raises:
        UsageError: why, and what to use instead.
    """
    _refuse(*_missing_types(device, precision, quantization))


def check_opset(device: Device, opset: int, precision: str | None = None) -> None:
    """Refuse an opset that the device's oldest TensorRT cannot take, before anything is exported.

    Args:
        precision: what the graphs will compute in; None checks the opset alone.

    Raises:
        UsageError: why, and what to use instead.
    """
    version = device.jetpacks[0].tensorrt if device.jetpacks else None
    if version and opset > newest_opset(version):
        raise UsageError(
            f"the parser of TensorRT {version} (JetPack {device.jetpacks[0].version}, {device.title}) takes opset "
            f"{newest_opset(version)}, not {opset}; export with --opset {newest_opset(version)}"
        )
    if device.builds_ahead and _needs_float32_attention(opset, precision):
        raise UsageError(f"{device.title}: {FLOAT32_ATTENTION}")


def _type_problems(manifest: Manifest, device: Device) -> Iterator[str]:
    yield from _missing_types(device, manifest.precision, (manifest.quantization or {}).get("type"))


def _missing_types(device: Device, precision: str, quantization: str | None) -> Iterator[str]:
    advice = {
        "fp8": "use int8 (--quantize int8), or the bundle without quantisation",
        "bf16": "export with --precision fp16",
    }
    for kind in (precision, quantization):
        if kind and kind not in device.types:
            first = FIRST_CAPABILITY[kind]
            able = [row.name for row in DEVICES if kind in row.types]
            yield (
                f"{device.title} has no {kind} hardware (compute capability {device.capability_text}; {kind} starts at "
                f"{first[0]}.{first[1]}: {', '.join(able[:4])} ...); {advice[kind]}"
            )


def _version_problems(device: Device, flavour: str, version: str | None) -> Iterator[str]:
    if flavour == "tensorrt_rtx" and not device.builds_ahead:
        yield (
            f"TensorRT-RTX does not build these graphs for compute capability {device.capability_text} ({device.title}); "
            f"leave --flavour out to get a device kit"
        )
    if version is None:
        return
    if flavour == "tensorrt_rtx":
        if version_key(version) < version_key(OLDEST_RTX):
            yield f"TensorRT-RTX {version} is older than {OLDEST_RTX}; pip install -U tensorrt-rtx-cu12"
        return
    first = FIRST_TENSORRT.get(device.capability, OLDEST_TENSORRT)
    if version_key(version) < version_key(first):
        yield f"TensorRT {version} does not know {device.title}; {first} is the first that does"


def _opset_problems(
    manifest: Manifest, opsets: Mapping[str, int], device: Device, flavour: str, version: str | None
) -> Iterator[str]:
    version = version or (device.jetpacks[0].tensorrt if device.jetpacks else KIT_TENSORRT)
    most = RTX_OPSET if flavour == "tensorrt_rtx" else newest_opset(version)
    label = f"TensorRT {version}" if flavour == "tensorrt" else "TensorRT-RTX"
    if flavour == "tensorrt_rtx" and _needs_float32_attention(manifest.opset, manifest.precision):
        yield FLOAT32_ATTENTION
    for graph, opset in sorted(opsets.items()):
        if opset > most:
            yield f"{graph} uses opset {opset}, and the parser of {label} takes {most}; export with --opset {most}"


def _needs_float32_attention(opset: int, precision: str | None) -> bool:
    return opset > DEFAULT_OPSET and precision == "fp32"


def newest_opset(version: str) -> int:
    """The newest opset that this TensorRT's parser takes."""
    return max((opset for first, opset in PARSER_OPSETS if version_key(version) >= version_key(first)), default=0)


def _disk_problems(folder: Path, estimate: Estimate) -> Iterator[str]:
    free = shutil.disk_usage(folder).free
    if estimate.plans > free:
        yield f"the plans take about {gib(estimate.plans)} and {folder} has {gib(free)} free; free some space"


def version_key(version: str) -> tuple[int, ...]:
    """Sortable form of a version: numbers only, ``10.13.0.35`` after ``10.3``."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _spans(profile: Profile) -> str:
    """Each shape once, behind the names of the inputs that share it."""
    named: dict[str, list[str]] = {}
    for name, span in profile.ranges.items():
        named.setdefault(_span(span.min, span.opt, span.max), []).append(name)
    return "; ".join(f"{', '.join(names)} {shapes}" for shapes, names in named.items())


def _span(low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> str:
    return "-".join("x".join(map(str, shape)) for shape in (low, best, high))
