"""Our calls against the real API of TensorRT 10.3, 10.13 and 11.4: names listed from NVIDIA's own bindings wheels.

tensorrt_api.json was made by list_tensorrt_api.py; a name that one release lacks fails here instead of on a board.
"""

import ast
import json
from pathlib import Path

import pytest

import metaembed.export
import metaembed.runtime

HERE = Path(__file__).parent
API = json.loads((HERE / "tensorrt_api.json").read_text())["tensorrt-cu12-bindings"]
FILES = (
    Path(metaembed.export.__file__).parent / "engine_worker.py",
    Path(metaembed.runtime.__file__).parent / "session_trt.py",
    Path(metaembed.runtime.__file__).parent / "trt_engine.py",
)
# What our variables hold. An attribute of any of them is a call into TensorRT.
VARIABLES = {
    "builder": "Builder",
    "definition": "INetworkDefinition",
    "config": "IBuilderConfig",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "context": "IExecutionContext",
    "cache": "ITimingCache",
    "t": "ITensor",
}
# Asked for with hasattr, and done without where it is missing: streamed serialisation came after 10.3.
OPTIONAL = {"Builder.build_serialized_network_to_stream", "IStreamWriter", "IStreamWriter.write"}
OUR_OWN = {"run", "fetch", "fitting", "close", "inputs", "max_items", "profiles"}  # of EngineRunner, also called engine


def owner(node: ast.expr) -> str | None:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    return VARIABLES.get(name)


def used_names() -> set[str]:
    """What all of our files use."""
    return set().union(*(names_in(path.read_text()) for path in FILES)) - {"ILogger.Severity"}


def names_in(source: str) -> set[str]:
    """``Class.member`` of every attribute on a TensorRT object and of every method that overrides one, and ``Class`` or
    ``Class.member`` behind ``trt.``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            bases = [base.attr for base in node.bases if ast.unparse(base).startswith("trt.")]
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef) and part.name[0] != "_"]
            found |= {f"{base}.{method}" for base in bases for method in methods}
        elif isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            if chain[0] == "trt" and chain[1][0].isupper():
                found.add(".".join(part for part in chain[1:3] if part != "__init__"))
            elif owner(node.value) and node.attr not in OUR_OWN and not node.attr.startswith("_"):
                found.add(f"{owner(node.value)}.{node.attr}")
    return found


def lacking(version: str, names: set[str]) -> set[str]:
    classes = API[version]
    return {
        name
        for name in names
        if (kind := name.split(".")[0]) not in classes
        or ("." in name and name.split(".")[1] not in classes[kind].split())
    }


def test_the_list_of_what_we_use_is_not_empty_by_accident():
    names = used_names()
    assert {"IExecutionContext.execute_async_v3", "ICudaEngine.get_tensor_profile_shape"} <= names
    assert {"Runtime.deserialize_cuda_engine", "IBuilderConfig.get_timing_cache", "IProgressMonitor"} <= names
    assert {"ITimingCache.serialize", "ITensor.dtype", "ITensor.name", "ITensor.shape"} <= names
    assert {f"IProgressMonitor.{name}" for name in ("phase_start", "step_complete", "phase_finish")} <= names
    assert {"IStreamWriter.write", "ILogger.log"} <= names
    assert len(names) > 25


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("cache.serialise()", "ITimingCache.serialise"),
        ("[t.kind for t in found]", "ITensor.kind"),
        ("class Writer(trt.IStreamWriter):\n    def put(self, data): ...", "IStreamWriter.put"),
        ("class Logger(trt.ILogger):\n    def say(self, severity, message): ...", "ILogger.say"),
    ],
)
def test_a_name_that_no_release_has_would_be_found(source, name):
    assert name in names_in(source)
    assert all(name in lacking(version, names_in(source)) for version in API)


@pytest.mark.parametrize("version", API)
def test_every_name_exists_in_this_release(version):
    assert lacking(version, used_names() - OPTIONAL) == set()


def test_what_is_optional_is_missing_somewhere_and_guarded():
    assert lacking("10.3.0", OPTIONAL) == OPTIONAL
    assert lacking("10.13.0.35", OPTIONAL) == set()
    assert 'hasattr(builder, "build_serialized_network_to_stream")' in FILES[0].read_text()


def test_types_that_sessions_know_exist_in_every_release():
    from metaembed.runtime.trt_engine import DTYPES

    for classes in API.values():
        assert set(DTYPES) <= set(classes["DataType"].split())
        assert "INPUT" in classes["TensorIOMode"].split()


def test_no_flag_that_tensorrt_11_removed_is_used():
    """Precision flags and weak typing are gone from 11: strongly typed networks are the one route valid everywhere."""
    source = FILES[0].read_text()
    assert "strongly_typed=True" in source
    for flag in ("FP16", "BF16", "INT8", "FP8"):
        assert f"BuilderFlag.{flag}" not in source
    assert "INT8" not in API["11.4.0.106"]["BuilderFlag"].split()
    assert "FP16" in API["10.3.0"]["BuilderFlag"].split()
