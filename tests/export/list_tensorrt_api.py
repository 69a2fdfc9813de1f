"""List the Python API of TensorRT releases: ``python list_tensorrt_api.py WHEEL... > tensorrt_api.json``.

The wheels are ``tensorrt-cu12-bindings`` of each version (``pip download --no-deps``). Their libraries are on another
index and need a GPU, so the bindings are imported against empty stand-ins for them, in a process for each wheel: the
names and classes are all there, and nothing is ever called. Needs gcc. Only names are kept.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLASSES = (
    "Builder IBuilderConfig INetworkDefinition OnnxParser IOptimizationProfile ICudaEngine IExecutionContext Runtime "
    "IProgressMonitor IStreamWriter ILogger Logger ITensor TensorIOMode DataType BuilderFlag ITimingCache "
    "NetworkDefinitionCreationFlag ProfilingVerbosity"
).split()
FUNCTIONS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getNvOnnxParserVersion initLibNvInferPlugins "
    "getPluginRegistry getBuilderPluginRegistry getInferLibVersion"
).split()


def list_wheel(wheel: Path) -> tuple[str, dict[str, str]]:
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        make_stand_ins(Path(folder), version.split(".")[0])
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        listed = subprocess.run([sys.executable, __file__], env=environment, check=True, capture_output=True, text=True)
    return version, json.loads(listed.stdout)


def make_stand_ins(folder: Path, major: str) -> None:
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        name = f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)


def list_classes() -> dict[str, str]:
    module = importlib.import_module("tensorrt_bindings.tensorrt")
    found = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    return {name: " ".join(sorted(n for n in dir(kind) if not n.startswith("_"))) for name, kind in found.items()}


if __name__ == "__main__":
    wheels = [Path(name) for name in sys.argv[1:]]
    result = {"tensorrt-cu12-bindings": dict(map(list_wheel, wheels))} if wheels else list_classes()
    print(json.dumps(result, indent=1))  # noqa: T201 - a command
