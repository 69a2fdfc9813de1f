"""The lines a person can paste to build the same engine with Polygraphy or trtexec, from inside the bundle's folder."""

from __future__ import annotations

import shlex

from metaembed.runtime.devices import Capability

from .profiles import EngineSpec, Shape


def polygraphy_command(spec: EngineSpec, flavour: str, capability: Capability) -> str:
    """``polygraphy convert`` with one --trt-min/opt/max-shapes group per profile."""
    words = ["polygraphy", "convert", spec.graph, "--convert-to", "trt", "--strongly-typed", "-o", f"{spec.name}.plan"]
    for profile in spec.profiles:
        for bound in ("min", "opt", "max"):
            words.append(f"--trt-{bound}-shapes")
            words += [f"{name}:{_brackets(getattr(span, bound))}" for name, span in profile.ranges.items()]
    if flavour == "tensorrt":
        return shlex.join(words + ["--tf32"] * spec.tf32)  # off unless asked for
    words += ["--compute-capabilities", ".".join(map(str, capability))]
    return "POLYGRAPHY_USE_TENSORRT_RTX=1 " + shlex.join(words)


def trtexec_command(spec: EngineSpec, flavour: str, capability: Capability, version: str) -> str:
    """``trtexec`` (its name is ``tensorrt_rtx`` in TensorRT-RTX) with one --profile group per profile.

    From TensorRT 11 on every network is strongly typed and the flag is gone. trtexec allows TensorFloat-32 unless told otherwise;
    capabilities are written without a dot (docs.nvidia.com/deeplearning/tensorrt-rtx, performance best practices: 80,86,89,120).
    """
    rtx = flavour == "tensorrt_rtx"
    words = ["tensorrt_rtx" if rtx else "trtexec", f"--onnx={spec.graph}", f"--saveEngine={spec.name}.plan"]
    if rtx:
        words.append(f"--computeCapabilities={''.join(map(str, capability))}")
    else:
        words += ["--stronglyTyped"] * (int(version.split(".")[0]) < 11) + ["--noTF32"] * (not spec.tf32)
    words.append("--skipInference")
    for index, profile in enumerate(spec.profiles):
        if len(spec.profiles) > 1:
            words.append(f"--profile={index}")
        for bound in ("min", "opt", "max"):
            shapes = (f"{name}:{_crosses(getattr(span, bound))}" for name, span in profile.ranges.items())
            words.append(f"--{bound}Shapes=" + ",".join(shapes))
    return shlex.join(words)


def _brackets(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _crosses(shape: Shape) -> str:
    return "x".join(map(str, shape))
