"""The route that a device takes: what is found out about a machine, and TensorRT's own half of the builder's process.

TensorRT itself needs a GPU. TensorRT-RTX under its name does not, and has the same API as TensorRT 11 in all that is called
here, so it shows that the route runs to its end; it says nothing about engines of TensorRT.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from metaembed.runtime.engines import read_engine_sets
from metaembed.runtime.manifest import Bundle

FOUND = """
import sys
from metaembed.export.route import installed_versions
print(installed_versions()["tensorrt"], "tensorrt" in sys.modules)
"""


@pytest.mark.parametrize("metadata", [False, True], ids=["without metadata", "with metadata"])
def test_a_systems_tensorrt_is_found_with_or_without_metadata(tmp_path, metadata):
    """As Debian installs it: a folder in dist-packages. What it says of itself is a version of JetPack 6."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text('__version__ = "10.3.0"\n')
    if metadata:
        (about := tmp_path / "tensorrt-10.3.0.dist-info").mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.3.0\n")
        (about / "top_level.txt").write_text("tensorrt\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){FOUND}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10.3.0", str(not metadata)], "where metadata tells, nothing is imported"


STAND_IN = """
from tensorrt_rtx import *
make = Builder.create_builder_config
def create(builder):
    config = make(builder)
    config.num_compute_capabilities = 1
    config.set_compute_capability(ComputeCapability.SM80, 0)
    return config
Builder.create_builder_config = create
__version__ = "11.4.0"
"""
BUILD = """
import sys
from types import SimpleNamespace
import metaembed.export.build as build
from metaembed.export.cli_build import main
build.find_gpu = lambda: SimpleNamespace(capability=(8, 0))
sys.exit(main([".", "--target", "a100", "--flavour", "tensorrt", "--quiet"]))
"""


def test_the_route_of_a_device_runs_to_its_end(demo_bundle, tmp_path):
    """With tactics remembered between builds: the second starts from the first's timing cache."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'metaembed-export[tensorrt-rtx]'")
    folder = shutil.copytree(demo_bundle, tmp_path / "bundle", copy_function=os.link)
    (tmp_path / "path" / "tensorrt").mkdir(parents=True)
    (tmp_path / "path" / "tensorrt" / "__init__.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for force in ("", "-f"):
        code = BUILD.replace('"--quiet"', f'"--quiet", {force!r}' if force else '"--quiet"')
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "now run metaembed-check" in done.stdout
    (found,) = read_engine_sets(Bundle.open(folder))
    assert (found.flavour, found.version) == ("tensorrt", "11.4.0")
    assert found.misfit(Bundle.open(folder).manifest.fingerprint, (8, 0), {"tensorrt": "11.4.0"}) is None
    assert (tmp_path / "cache" / "metaembed" / "tensorrt-11.4.0-sm8.0.timing").stat().st_size > 0


def test_progress_of_several_threads_stays_one_event_a_line():
    """TensorRT calls its progress monitor from several threads; a slow stream makes them meet."""
    worker = pytest.importorskip("metaembed.export.engine_worker", reason="needs polygraphy")

    class Slow(io.StringIO):
        def write(self, text):
            time.sleep(0.0005)
            return super().write(text)

    stream = Slow()
    events = worker.Events(stream)
    threads = [
        threading.Thread(target=lambda name=name: [events.send(event="step", name=name, done=k) for k in range(10)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted((event["name"], event["done"]) for event in found) == [(n, k) for n in "abcd" for k in range(10)]


CONFIG = """
import json, sys
from metaembed.export.engine_worker import make_config, trt
builder = trt.Builder(trt.Logger())
network = builder.create_network(0)
common = {"profiles": [], "capability": [8, 0]}
orders = ({}, {"tf32": False}, {"tf32": True})
configs = [make_config({**common, **order}, None, builder, network) for order in orders]
flags = [config.get_flag(trt.BuilderFlag.TF32) for config in configs]
print(json.dumps([builder.create_builder_config().get_flag(trt.BuilderFlag.TF32), *flags]))
"""


def test_float32_engines_are_built_without_tensorfloat_32():
    """TensorRT-RTX's own default is on, and Polygraphy's configuration leaves it so: 10 bits where 1e-5 was promised."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([sys.executable, "-c", CONFIG], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False, False, True]
