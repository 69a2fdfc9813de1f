"""What an engine weighs: bytes of its weights, of its plan, of the build, and of serving it.

Weights follow from the geometry exactly; the rest are measured factors, each with its measurement beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from metaembed.runtime.geometry import Geometry
from metaembed.runtime.manifest import LANGUAGE, SCORER, VISION, Manifest
from metaembed.runtime.memory import GIB

from .profiles import EngineSpec, Profile

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}

# Kernels and metadata that a plan holds beside its weights, for each profile: 0.67-0.83 MB per transformer block of a 3B
# model and 1.2 MB more, which is what shows in the demo. TensorRT-RTX 1.7.1, sm_80, bf16.
PLAN_BYTES_PER_BLOCK, PLAN_BYTES_PER_PROFILE = 0.8e6, 1.2e6
# Peak anonymous memory of a TensorRT-RTX build of a 3B bf16 model: 10.45 GB for a plan of 6.23, 2.29 to 2.40 GB for one of 1.36,
# 0.22 GiB for next to nothing (the demo). The factor is the highest seen.
RTX_BUILD_FACTOR, RTX_BUILD_BASE = 1.73, 0.22 * GIB
# TensorRT on a device times kernels with the weights loaded. Reports from Jetson builders: 3-4 times the parameters
# (github.com/NVIDIA/TensorRT-Edge-LLM issue 30), in the one memory that its CPU and GPU have. A card has its own for the GPU's
# copies, so on the host TensorRT-RTX's factor is taken. Neither was measured by us with TensorRT.
UNIFIED_BUILD_FACTOR, TRT_BUILD_BASE = 3.5, 1.0 * GIB
# Activation memory that TensorRT-RTX reports for 3B bf16, per position (b * t, or patches) and value of the MLP's width:
# 1.117 GB for 12,736 and 0.584 GB for 6,624 positions x 11,008; 2.039 GB for 57,856 patches x 3,420.
# The demo in fp32: 13.54 GB for 8 images of 7,232 patches, 13.39 of which are attention scores.
ACTIVATION_BYTES = {LANGUAGE: 8.0, VISION: 10.3}
SERVING_BASE = 0.6 * GIB  # CUDA context, TensorRT, Python


@dataclass(frozen=True)
class Weights:
    """Parameters of one graph: those of the quantisable matrices, of the token table, and all others."""

    matrices: int
    others: int
    table: int = 0

    def bytes(self, precision: str, quantization: Mapping[str, Any] | None) -> int:
        """``quantization``: the manifest's, every matrix quantised."""
        recipe = quantization or {}
        matrices, table = (BYTES[recipe.get(what) or precision] for what in ("type", "token_table"))
        return self.matrices * matrices + self.table * table + self.others * BYTES[precision]


@dataclass(frozen=True)
class Estimate:
    """All in bytes. ``build_peak`` is of the largest single engine: engines are built one after the other. Served, they
    are all open, each with its own ``activations``, which are summed here."""

    weights: int
    plans: int
    build_peak: int
    activations: int
    serving: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def gib(amount: float) -> str:
    return f"{amount / GIB:.1f} GiB" if amount >= GIB / 2 else f"{amount / (1 << 20):.0f} MiB"


def count_weights(geometry: Geometry) -> dict[str, Weights]:
    """Parameters of the vision and the language graph, by Qwen2.5-VL's layer shapes."""
    text, vision = geometry.text, geometry.vision
    kv = text.kv_heads * text.head_dim
    block = 2 * text.hidden * (text.hidden + kv) + 3 * text.hidden * text.intermediate
    rest = text.layers * (3 * text.hidden + 2 * kv) + text.hidden + geometry.meta_tokens * text.hidden
    rest += (text.hidden + 1) * (geometry.projection or 0)
    seen = 4 * vision.hidden**2 + 3 * vision.hidden * vision.intermediate
    merged = vision.hidden * vision.merge**2
    merger = merged * merged + merged * vision.out_hidden
    head = merged + vision.out_hidden + vision.hidden
    biases = vision.depth * (6 * vision.hidden + 2 * vision.intermediate + vision.hidden)
    return {
        "language": Weights(text.layers * block, rest, text.vocab * text.hidden),
        "vision": Weights(vision.depth * seen + merger, biases + head + vision.patch_values * vision.hidden),
    }


def estimate_build(
    manifest: Manifest, engines: Iterable[EngineSpec], flavour: str, *, unified: bool = False
) -> Estimate:
    """What building these engines with ``tensorrt`` or ``tensorrt_rtx`` and then serving them takes.

    ``unified``: TensorRT builds where CPU and GPU share one memory, a Jetson.
    """
    engines = tuple(engines)
    geometry = manifest.geometry
    weights = {
        name: part.bytes(manifest.precision, manifest.quantization) for name, part in count_weights(geometry).items()
    }
    blocks = {"vision": geometry.vision.depth, "language": geometry.text.layers}
    plans = [
        weights.get(part, 0)
        + int(len(engine.profiles) * (PLAN_BYTES_PER_BLOCK * blocks.get(part, 1) + PLAN_BYTES_PER_PROFILE))
        for engine, part in ((engine, Path(engine.graph).stem) for engine in engines)
    ]
    base = RTX_BUILD_BASE if flavour == "tensorrt_rtx" else TRT_BUILD_BASE
    factor = UNIFIED_BUILD_FACTOR if unified and flavour == "tensorrt" else RTX_BUILD_FACTOR
    activations = int(sum(_activation_bytes(manifest, engine) for engine in engines))
    return Estimate(
        weights=sum(weights.values()),
        plans=sum(plans),
        build_peak=int(max(plans) * factor + base),
        activations=activations,
        serving=int(sum(plans) + activations + SERVING_BASE),
    )


def _activation_bytes(manifest: Manifest, engine: EngineSpec) -> float:
    """Of the largest shape that any profile of the engine allows."""
    if engine.graph == SCORER:
        return max(_scorer_bytes(profile) for profile in engine.profiles)
    part = manifest.geometry.vision if engine.graph == VISION else manifest.geometry.text
    name = "patch_mask" if engine.graph == VISION else "mask"
    width = part.intermediate * BYTES[manifest.precision] / 2 * ACTIVATION_BYTES[engine.graph]
    shapes = [profile.ranges[name].max for profile in engine.profiles]  # (i, w, 64) or (b, t)
    return max(prod(shape) * width + _score_bytes(manifest, part.heads, shape) for shape in shapes)


def _scorer_bytes(profile: Profile) -> float:
    """In float32: the widened candidates, their products with all query vectors, and the maximum of those."""
    (queries, query, _), (chunk, candidate, dim) = (profile.ranges[name].max for name in ("queries", "candidates"))
    return 4.0 * chunk * (candidate * dim + queries * query * (candidate + 1))


def _score_bytes(manifest: Manifest, heads: int, shape: tuple[int, ...]) -> float:
    """Attention scores before and after the softmax. Only in fp32: bf16 and fp16 attention is fused and keeps none."""
    return 2 * 4.0 * heads * shape[0] * prod(shape[1:]) ** 2 if manifest.precision == "fp32" else 0.0
