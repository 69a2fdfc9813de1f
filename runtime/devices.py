"""The devices an engine can be built for: one table with a source beside each row, and a chooser.

Figures are nominal: memory as the vendor names it (a device reports 1-4 % less), peak rates dense (a data sheet's
sparse figure halved), at the boost clock of the module's standard power mode.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import UsageError

Capability = tuple[int, int]

# The first compute capability with hardware for a type (hardware and precision table of the support matrix,
# https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html). The builder itself
# refuses FP8 below 8.9 and bf16 below 8.0, measured with TensorRT-RTX 1.7.
FIRST_CAPABILITY: dict[str, Capability] = {
    "fp32": (7, 5),
    "fp16": (7, 5),
    "int8": (7, 5),
    "bf16": (8, 0),
    "fp8": (8, 9),
}

# What TensorRT-RTX builds of our graphs on a machine without a GPU (https://docs.nvidia.com/deeplearning/tensorrt-rtx/
# latest/inference-library/cpu-engines.html; every one of these built, and 8.7, 9.0 and 11.0 refused, with 1.7.1).
# It documents 7.5 too, but refuses our scorer's float32 products there: "FP32 GEMM is not supported".
RTX_CAPABILITIES: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (12, 0))

# The first TensorRT that knows a capability (release notes of 10.8 and 10.13); the others precede the 10.3 we need.
FIRST_TENSORRT: dict[Capability, str] = {(11, 0): "10.13", (12, 0): "10.8"}


def supported_types(capability: Capability) -> frozenset[str]:
    """The compute types that a GPU of this compute capability has hardware for."""
    return frozenset(kind for kind, first in FIRST_CAPABILITY.items() if capability >= first)


@dataclass(frozen=True)
class JetPack:
    """One JetPack release and a TensorRT for it: for which boards, and what a recipe must know about its system.

    ``brings``: the TensorRT of the release itself, where ``tensorrt`` is installed on top of it.
    """

    version: str
    tensorrt: str
    families: tuple[str, ...]
    python: str
    cuda: str
    source: str
    brings: str | None = None


_ORIN_FAMILIES = ("agx-orin", "orin-nx", "orin-nano")
_JETPACK_MIGRATION = (
    "https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html"
)
_ARCHIVE = "https://developer.nvidia.com/embedded/jetpack-archive"
JETPACKS: tuple[JetPack, ...] = (
    JetPack("6.1", "10.3.0", _ORIN_FAMILIES, "3.10", "12.6", "https://developer.nvidia.com/embedded/jetpack-sdk-61"),
    JetPack("6.2", "10.3.0", _ORIN_FAMILIES, "3.10", "12.6", "https://developer.nvidia.com/embedded/jetpack-sdk-62"),
    JetPack("7.0", "10.13", ("thor",), "3.12", "13.0", _ARCHIVE),
    JetPack("7.1", "10.13", ("thor",), "3.12", "13.0", _ARCHIVE),
    JetPack("7.2", "10.16", (*_ORIN_FAMILIES, "thor"), "3.12", "13.2", _ARCHIVE),
    # From the Linux SBSA package, on these boards only.
    JetPack("7.2.2", "11.4.1", ("agx-orin", "thor"), "3.12", "13.2", _JETPACK_MIGRATION, brings="10.16"),
)


@dataclass(frozen=True)
class Device:
    """One row of the table. ``peak_tflops`` is dense, by type, INT8 in TOPS; a missing type has no hardware here.

    ``integrated``: GPU and CPU share one memory, so the operating system and the builder live in ``memory_gib`` too.
    """

    name: str
    title: str
    family: str
    aliases: tuple[str, ...]
    capability: Capability
    memory_gib: int
    bandwidth_gb_s: float
    peak_tflops: Mapping[str, float] = field(hash=False)
    source: str
    integrated: bool = False

    def __post_init__(self) -> None:
        if set(self.peak_tflops) != self.types:
            raise ValueError(f"{self.name}: peak rates for {sorted(self.peak_tflops)}, types {sorted(self.types)}")

    @property
    def types(self) -> frozenset[str]:
        """fp32, fp16, int8, and where the hardware has them bf16 and fp8."""
        return supported_types(self.capability)

    def limit_ms(self, kind: str, operations: int, nbytes: int) -> float:
        """The least milliseconds that any program needs: all operations of a type at its peak rate, or these bytes read once."""
        return 1e3 * max(operations / (self.peak_tflops[kind] * 1e12), nbytes / (self.bandwidth_gb_s * 1e9))

    @property
    def jetpacks(self) -> tuple[JetPack, ...]:
        """The JetPack releases for this board, oldest first; empty for a GPU that takes any TensorRT."""
        return tuple(pack for pack in JETPACKS if self.family in pack.families)

    @property
    def builds_ahead(self) -> bool:
        """Whether TensorRT-RTX can build all of a bundle's engines for it on a machine without a GPU."""
        return self.capability in RTX_CAPABILITIES

    @property
    def capability_text(self) -> str:
        return ".".join(map(str, self.capability))


def _ampere_orin(fp32: float, fp16: float) -> dict[str, float]:
    """Orin's GPU (GA10B): bf16 as fp16, INT8 twice that, no FP8."""
    return {"fp32": fp32, "bf16": fp16, "fp16": fp16, "int8": 2 * fp16}


_A100 = {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0, "int8": 624.0}
_HOPPER = {"fp32": 66.9, "bf16": 989.4, "fp16": 989.4, "int8": 1978.9, "fp8": 1978.9}
_SHEETS = "https://www.nvidia.com/en-us/data-center/"
_ORIN_BRIEF = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/nvidia-jetson-agx-orin-technical-brief.pdf"
)
_MODULES = "https://developer.nvidia.com/embedded/jetson-modules"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_THOR = "https://developer.nvidia.com/blog/introducing-nvidia-jetson-thor-the-ultimate-platform-for-physical-ai/"

# The first row of a family is what the bare family name means: "orin" is the AGX Orin 64 GB, "a100" the 80 GB card.
# fmt: off
DEVICES: tuple[Device, ...] = (
    Device("t4", "NVIDIA T4", "t4", (), (7, 5), 16, 320,
           {"fp32": 8.1, "fp16": 65, "int8": 130}, _SHEETS + "tesla-t4/"),
    Device("a100-80gb", "NVIDIA A100 80 GB SXM", "a100", ("a100",), (8, 0), 80, 2039, _A100, _SHEETS + "a100/"),
    Device("a100-40gb", "NVIDIA A100 40 GB", "a100", (), (8, 0), 40, 1555, _A100, _SHEETS + "a100/"),
    Device("a10", "NVIDIA A10", "a10", (), (8, 6), 24, 600,
           {"fp32": 31.2, "bf16": 125, "fp16": 125, "int8": 250}, _SHEETS + "products/a10-gpu/"),
    Device("agx-orin-64gb", "Jetson AGX Orin 64 GB", "agx-orin",
           ("orin", "agx-orin", "orin-agx", "orin-64gb", "orin-agx-64gb"), (8, 7), 64, 204.8,
           _ampere_orin(5.3, 42.5), _ORIN_BRIEF, integrated=True),
    Device("agx-orin-32gb", "Jetson AGX Orin 32 GB", "agx-orin", ("orin-32gb", "orin-agx-32gb"),
           (8, 7), 32, 204.8, _ampere_orin(3.3, 27), _ORIN_BRIEF, integrated=True),
    # The small boards at their standard modes; MAXN SUPER (JetPack 6.2) raises the NX and Nano by 1.6-1.7.
    Device("orin-nx-16gb", "Jetson Orin NX 16 GB", "orin-nx", ("orin-nx",),
           (8, 7), 16, 102.4, _ampere_orin(1.88, 15), _MODULES, integrated=True),
    Device("orin-nx-8gb", "Jetson Orin NX 8 GB", "orin-nx", (),
           (8, 7), 8, 102.4, _ampere_orin(1.57, 12.5), _MODULES, integrated=True),
    Device("orin-nano-8gb", "Jetson Orin Nano 8 GB", "orin-nano", ("orin-nano",),
           (8, 7), 8, 68, _ampere_orin(1.28, 10), _MODULES, integrated=True),
    Device("orin-nano-4gb", "Jetson Orin Nano 4 GB", "orin-nano", (),
           (8, 7), 4, 34, _ampere_orin(0.64, 5), _MODULES, integrated=True),
    Device("l4", "NVIDIA L4", "l4", (), (8, 9), 24, 300,
           {"fp32": 30.3, "bf16": 121, "fp16": 121, "int8": 242.5, "fp8": 242.5}, _SHEETS + "l4/"),
    # GeForce cards run tensor cores with fp32 accumulation at half rate; TensorRT accumulates in fp32 for bf16.
    Device("rtx4090", "GeForce RTX 4090", "rtx4090", ("4090",), (8, 9), 24, 1008,
           {"fp32": 82.6, "bf16": 165.2, "fp16": 165.2, "int8": 660.6, "fp8": 330.3}, _ADA),
    Device("l40s", "NVIDIA L40S", "l40s", (), (8, 9), 48, 864,
           {"fp32": 91.6, "bf16": 362.05, "fp16": 362.05, "int8": 733, "fp8": 733}, _SHEETS + "l40s/"),
    Device("h100", "NVIDIA H100 SXM 80 GB", "h100", ("h100-80gb",), (9, 0), 80, 3350, _HOPPER,
           _SHEETS + "h100/"),
    Device("h200", "NVIDIA H200 SXM 141 GB", "h200", ("h200-141gb",), (9, 0), 141, 4800, _HOPPER,
           _SHEETS + "h200/"),
    # CUDA 12.8 called the same chip 10.1; an engine records what its own builder reported.
    Device("thor", "Jetson Thor T5000 128 GB", "thor", ("thor-t5000", "agx-thor", "t5000", "thor-128gb"),
           (11, 0), 128, 273, {"fp32": 8.06, "bf16": 258.5, "fp16": 258.5, "int8": 517, "fp8": 517}, _THOR,
           integrated=True),
    Device("rtx5090", "GeForce RTX 5090", "rtx5090", ("5090",), (12, 0), 32, 1792,
           {"fp32": 104.8, "bf16": 209.5, "fp16": 209.5, "int8": 838, "fp8": 419}, _BLACKWELL),
)
# fmt: on

_BY_NAME = {name: device for device in DEVICES for name in (device.name, *device.aliases)}
# What a name may hold besides, as in nvidia-smi's "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "Tesla T4".
_BESIDES = re.compile(r"nvidia|jetson|geforce|tesla|sxm\d?|pcie|hbm\d?e?")


def find_device(name: str) -> Device:
    """The row for a name or alias in any spelling ("A100", "AGX Orin 64GB", "rtx_4090"), nvidia-smi's included.

    Raises:
        UsageError: no row has that name; the sentence lists the known ones, the nearest first.
    """
    words = [word for word in re.split(r"[\s_-]+", name.strip().lower()) if not _BESIDES.fullmatch(word)]
    key = re.sub(r"(\d)-gb$", r"\1gb", "-".join(words).replace("rtx-", "rtx"))
    if key in _BY_NAME:
        return _BY_NAME[key]
    known = [device.name for device in DEVICES]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    known.sort(key=lambda item: near.index(item) if item in near else len(near))
    raise UsageError(f"there is no device {name!r} in the table; known: {', '.join(known)}")


def devices_of(capability: Capability) -> tuple[Device, ...]:
    """All rows of one compute capability; empty for a GPU that the table does not name."""
    return tuple(device for device in DEVICES if device.capability == capability)
