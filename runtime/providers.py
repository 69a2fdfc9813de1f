"""Which of ONNX Runtime's execution providers to try for a bundle, best first. Arithmetic on names: nothing is imported.

What is asked for is not always had (a wheel lists providers whose libraries are missing here), so each attempt is
judged by the provider that the session then names. The CUDA provider has run on a GPU (docs/gpu.md), the TensorRT provider has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .layout import PATCHES, TEMPLATE_TOKENS, UNITS, most_windows, square_windows
from .manifest import LANGUAGE, VISION, Manifest

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
YES = "True"  # the TensorRT provider's Python binding refuses "1" (onnxruntime_pybind_state.cc); the CUDA provider takes both
MOST_ITEMS = 4  # in one run of a TensorRT engine that ONNX Runtime builds

Options: TypeAlias = "dict[str, str]"
Span: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]"


@dataclass(frozen=True)
class Attempt:
    """One way to open graphs: providers, best first, on the graphs ``as_they_are`` or on their float32 twins.

    It has succeeded when every session names the first provider, or another but the CPU's, which only fills gaps.
    """

    providers: tuple[str, ...]
    as_they_are: bool

    @property
    def max_items(self) -> int | None:
        return MOST_ITEMS if self.providers[0] == TENSORRT else None

    def got(self, found: str) -> bool:
        """Whether a session whose first provider is ``found`` is what was asked for."""
        return found in self.providers and (found != CPU or self.providers == (CPU,))


def plan_attempts(available: Sequence[str], precision: str, graphs: Sequence[str]) -> list[Attempt]:
    """What to try for graphs that work together, the CPU last.

    Float32 graphs may go to ONNX Runtime's TensorRT provider. bf16 and fp16 graphs may not: that provider builds weakly
    typed networks, which narrow what the graph keeps in float32. The CUDA provider runs graphs as they are; if it lacks
    an operator in the narrow type, it gets the float32 twins.
    """
    attempts = []
    narrow = precision != "fp32"
    if CUDA in available:
        if TENSORRT in available and not narrow and set(graphs) <= {VISION, LANGUAGE}:
            attempts.append(Attempt((TENSORRT, CUDA, CPU), as_they_are=True))
        attempts.append(Attempt((CUDA, CPU), as_they_are=True))
        attempts += [Attempt((CUDA, CPU), as_they_are=False)] if narrow else []
    return [*attempts, Attempt((CPU,), as_they_are=False)]


def provider_options(
    name: str, manifest: Manifest, graph: str, cache: Path | None, *, cuda_graphs: bool = False
) -> Options:
    """Options of one provider for one graph; ``cache`` keeps the engines that ONNX Runtime builds."""
    if name == CUDA:
        # Float32 is float32: TensorFloat-32 has 10 bits. Memory grows by what is asked for, not to the next power of two.
        options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
        return options | ({"enable_cuda_graph": "1"} if cuda_graphs else {})
    return tensorrt_options(manifest, graph, cache) if name == TENSORRT else {}


def tensorrt_options(manifest: Manifest, graph: str, cache: Path | None) -> Options:
    """One profile over the bundle's limits, so that no shape makes ONNX Runtime build again; engines are kept.

    Names: onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.
    """
    spans = input_spans(manifest, graph)
    bounds = {
        f"trt_profile_{bound}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, span[place]))}" for name, span in spans.items()
        )
        for place, bound in ((0, "min"), (1, "opt"), (2, "max"))
    }
    int8 = (manifest.quantization or {}).get("type") == "int8"
    kept = {} if cache is None else {
        "trt_engine_cache_enable": YES,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": YES,
        "trt_timing_cache_path": str(cache),
    }  # fmt: skip
    return {**bounds, **kept, **({"trt_int8_enable": YES} if int8 else {})}


def input_spans(manifest: Manifest, graph: str) -> Mapping[str, Span]:
    """Smallest, typical and largest shape of each input, for both sides and all budgets of a bundle."""
    geometry, limits, largest = manifest.geometry, manifest.limits, manifest.largest
    windows = (1, square_windows(limits.image_tokens), most_windows(limits.image_tokens))
    batch = (1, 1, MOST_ITEMS)
    if graph == VISION:
        values = geometry.vision.patch_values
        axes = {"patches": (PATCHES, values), "patch_positions": (PATCHES, 2), "patch_mask": (PATCHES,)}
        return {name: _span(batch, windows, *rest) for name, rest in axes.items()}
    most = max(largest.query, largest.candidate)
    meta = geometry.query_tokens + most
    longest = limits.image_tokens + limits.text_tokens + TEMPLATE_TOKENS + meta
    length = (2, limits.image_tokens + meta, longest)
    slots = (1, UNITS * windows[1], UNITS * windows[2])
    return {
        "token_ids": _span(batch, length),
        "image_rows": _span(batch, length),
        "image_embeddings": _span(batch, slots, geometry.text.hidden),
        "positions": _span(batch, 3, length),
        "mask": _span(batch, length),
        "rows": _span((1, most, most)),
    }


def _span(*axes: int | tuple[int, int, int]) -> Span:
    low, best, high = zip(*(axis if isinstance(axis, tuple) else (axis,) * 3 for axis in axes), strict=True)
    return low, best, high
